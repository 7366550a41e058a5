"""Two sides that do not hold parts of one model learn so, in words, before anything runs."""

from dataclasses import replace

import pytest

from splitlearn.config import WireLimits
from splitlearn.errors import MessageError, ModelMismatch, ProtocolMismatch, SplitMismatch
from splitlearn.vocabulary import CodecId, Precision
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.handshake import (
    ModelIdentity,
    agreement,
    facts_from_proto,
    facts_to_proto,
    hello,
    welcome,
)
from splitlearn.wire.messages import TrunkFacts

OURS = ModelIdentity.of("ab" * 16, "cd" * 16, 2, 26, 2)
FACTS = TrunkFacts(
    attention="sdpa",
    session_tokens=4096,
    max_positions=8192,
    precision=Precision(weights="float32"),
    lease_s=600,
)


def greet(
    identity=OURS, *, client=b"x" * 16, wants_checksum=True, offers_checksum=True, **changes
) -> pb.Welcome:
    greeting = hello(identity, client, Precision(), checksum=offers_checksum)
    for field, value in changes.items():
        setattr(greeting, field, value)
    return welcome(greeting, OURS, FACTS, WireLimits(), checksum=wants_checksum, answer_window=4)


def test_two_sides_of_one_model_agree():
    agreed = agreement(greet())
    assert agreed.checksum
    assert (agreed.max_positions, agreed.attention) == (8192, "sdpa")
    assert agreed.codecs == {codec.value for codec in CodecId}
    assert agreed.chunk_bytes == WireLimits().chunk_bytes


def test_a_server_without_limits_is_refused():
    with pytest.raises(MessageError, match="no limits"):
        agreement(pb.Welcome(protocol=1))


def test_another_split_is_named_with_what_to_do():
    with pytest.raises(SplitMismatch, match="bottom_layers=2 and top_layers=2"):
        greet(replace(OURS, bottom_layers=3, trunk_layers=25))


@pytest.mark.parametrize("part", ["weights_hash", "config_hash"])
def test_another_model_is_refused(part):
    with pytest.raises(ModelMismatch, match=part.removesuffix("_hash")[:6]):
        greet(replace(OURS, **{part: 1}))


def test_another_protocol_is_refused_on_both_sides():
    with pytest.raises(ProtocolMismatch, match="speaks protocol 7"):
        greet(protocol=7)
    with pytest.raises(ProtocolMismatch, match="speaks protocol 8"):
        agreement(pb.Welcome(protocol=8))


def test_a_client_without_a_proper_id_is_refused():
    with pytest.raises(MessageError):
        greet(client=b"short")


def test_a_checksum_is_left_out_only_if_both_sides_can():
    assert not agreement(greet(wants_checksum=False, offers_checksum=False)).checksum
    assert agreement(greet(wants_checksum=False, offers_checksum=True)).checksum
    assert agreement(greet(wants_checksum=True, offers_checksum=False)).checksum


def test_what_a_server_says_of_itself_arrives():
    facts = replace(
        FACTS, model_type="llama", hidden_size=576, kv_bytes_total=10, kv_bytes_free=4, sessions=3
    )
    arrived = facts_from_proto(facts_to_proto(facts, WireLimits(), 4))
    for name in (
        "model_type",
        "hidden_size",
        "kv_bytes_total",
        "kv_bytes_free",
        "sessions",
        "session_tokens",
    ):
        assert getattr(arrived, name) == getattr(facts, name)
