"""A moved session's parts are what was sent, bit for bit, or refused before torch computes on them."""

import pytest
import torch

from splitlearn.config import WireLimits
from splitlearn.errors import CorruptFrame, FrameError, MessageError
from splitlearn.vocabulary import Precision, Versions
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.handshake import ModelIdentity
from splitlearn.wire.messages import SessionHead
from splitlearn.wire.sessions import MovedSession, session_from_parts, session_to_parts

IDENTITY = ModelIdentity(1, 2, 2, 3, 2)
CLIENT = b"c" * 16
LIMITS = WireLimits()


def moved(dtype: torch.dtype = torch.float32) -> MovedSession:
    """Three layers of different form, two rows of five tokens, one of them padded."""
    torch.manual_seed(0)
    forms = [(2, 4, 4), (1, 3, 5), (2, 4, 4)]
    layers = tuple(
        (torch.randn(2, heads, 5, key).to(dtype), torch.randn(2, heads, 5, value).to(dtype))
        for heads, key, value in forms
    )
    visible_BL = torch.ones(2, 5, dtype=torch.bool)
    visible_BL[1, :2] = False
    head = SessionHead(2, 5, 7, Versions("notes", 3), 99, True, Precision("float32", "bfloat16"))
    return MovedSession(IDENTITY, head, layers, visible_BL)


def parts_of(session: MovedSession, part_bytes: int = 100) -> list[pb.SessionPart]:
    parts = session_to_parts(session, 4, CLIENT, part_bytes)
    return [pb.SessionPart.FromString(part.SerializeToString()) for part in parts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part_bytes", [1, 100, 200, 1 << 20])
def test_a_session_arrives_as_it_was_sent(dtype, part_bytes):
    sent = moved(dtype)
    arrived = session_from_parts(parts_of(sent, part_bytes), 3, LIMITS)
    assert (arrived.identity, arrived.head) == (sent.identity, sent.head)
    assert torch.equal(arrived.visible_BL, sent.visible_BL)
    for layer, expected in zip(arrived.layers, sent.layers, strict=True):
        assert all(map(torch.equal, layer, expected))


def test_the_first_part_alone_says_what_the_session_is():
    first, *others = parts_of(moved())
    assert (first.session, first.client, first.rows, first.length) == (4, CLIENT, 2, 5)
    assert not first.HasField("keys")
    assert not any(part.HasField("fingerprint") or part.client for part in others)


def no_parts(parts):
    parts.clear()


def no_last_part(parts):
    parts.pop()


def twice(parts):
    parts.insert(2, parts[1])


def other_heads(parts):
    parts[2].keys.shape[:] = [1, 1, *parts[2].keys.shape[2:3], 2 * parts[2].keys.shape[3]]
    parts[2].values.shape[:] = [1, 1, *parts[2].values.shape[2:3], 2 * parts[2].values.shape[3]]


def keys_unlike_values(parts):
    parts[1].values.shape[:] = [parts[1].values.shape[0], 1, 2 * parts[1].values.shape[2], 4]


def keys_for_values(parts):
    parts[1].values.CopyFrom(parts[1].keys)


def another_bit(parts):
    parts[1].mask_columns.data = b"\1"


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (no_parts, MessageError),
        (no_last_part, MessageError),
        (twice, MessageError),
        (other_heads, FrameError),
        (keys_unlike_values, FrameError),
        (keys_for_values, FrameError),
        (another_bit, CorruptFrame),
    ],
)
def test_parts_that_are_wrong_are_refused(change, kind):
    session = moved()
    session.visible_BL[0, 0] = False
    parts = parts_of(session)
    change(parts)
    with pytest.raises(kind):
        session_from_parts(parts, 3, LIMITS)
