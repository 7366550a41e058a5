"""The first words of a stream: both sides learn whether they hold parts of the same model."""

from __future__ import annotations

from dataclasses import dataclass, field

from splitlearn import __version__
from splitlearn.config import WireLimits
from splitlearn.errors import MessageError, ModelMismatch, ProtocolMismatch, SplitMismatch
from splitlearn.vocabulary import Precision
from splitlearn.wire.codecs import CODECS
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.messages import TrunkFacts
from splitlearn.wire.precision import precision_from_proto, precision_to_proto

PROTOCOL = 1
FEATURES = frozenset({"generate", "train"})
NATIVE_BFLOAT16 = "bfloat16"
"""A further feature, of a trunk whose device multiplies matrices in bfloat16 by itself."""
CLIENT_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model is cut where; equal on both sides or nothing runs."""

    config_hash: int
    weights_hash: int
    bottom_layers: int
    trunk_layers: int
    top_layers: int

    @classmethod
    def of(cls, config_hash: str, weights_hash: str, bottom: int, trunk: int, top: int) -> ModelIdentity:
        """From hexadecimal hashes, of which the first 64 bits travel."""
        return cls(int(config_hash[:16], 16), int(weights_hash[:16], 16), bottom, trunk, top)

    @property
    def split(self) -> str:
        return f"{self.bottom_layers}/{self.trunk_layers}/{self.top_layers}"


@dataclass(frozen=True, slots=True)
class Agreement:
    """What both sides of one stream keep to after the handshake."""

    codecs: frozenset[int]
    checksum: bool
    max_message_bytes: int
    chunk_bytes: int
    max_positions: int
    attention: str
    """What the trunk's layers attend with; the client's should be the same."""
    lanes: int = 1
    """Connections that large messages may be spread over, the stream's own included."""
    ticket: bytes = field(default=b"", repr=False)
    """With which further connections become lanes of this stream."""


def hello(identity: ModelIdentity, client: bytes, precision: Precision, *, checksum: bool) -> pb.Hello:
    kinds = [pb.XXH3_64] if checksum else [pb.NO_CHECKSUM, pb.XXH3_64]
    return pb.Hello(
        protocol=PROTOCOL,
        features=sorted(FEATURES),
        fingerprint=identity_to_proto(identity),
        client=client,
        codecs=[codec.name for codec in CODECS],
        checksums=kinds,
        precision=precision_to_proto(precision),
        software=f"splitlearn/{__version__}",
    )


def joining(greeting: pb.Hello, ticket: bytes) -> pb.Hello:
    """The first words of a further connection of the stream that was given this ticket."""
    hello = pb.Hello(lane_of=ticket)
    hello.MergeFrom(greeting)
    return hello


def welcome(
    greeting: pb.Hello,
    identity: ModelIdentity,
    facts: TrunkFacts,
    limits: WireLimits,
    *,
    checksum: bool,
    answer_window: int,
    ticket: bytes = b"",
) -> pb.Welcome:
    """The server's answer to a client that fits.

    Raises:
        ProtocolMismatch, ModelMismatch, SplitMismatch: the client does not fit, and why.
        MessageError: the client's id is malformed.
    """
    if greeting.protocol != PROTOCOL:
        raise ProtocolMismatch(
            f"the client ({greeting.software[:60]}) speaks protocol {greeting.protocol}, this server "
            f"{PROTOCOL}: install the same version of splitlearn on both sides"
        )
    client_id(greeting.client)
    require_same_model(ours=identity, theirs=identity_from_proto(greeting.fingerprint))
    return pb.Welcome(
        protocol=PROTOCOL,
        features=sorted(FEATURES),
        fingerprint=identity_to_proto(identity),
        codecs=[codec.name for codec in CODECS],
        checksum=_checksum_kind(greeting, wanted=checksum),
        precision=precision_to_proto(facts.precision),
        limits=limits_to_proto(facts, limits, answer_window),
        software=f"splitlearn/{__version__}",
        attention=facts.attention,
        ticket=ticket,
    )


def client_id(client: bytes) -> bytes:
    """Raises MessageError where it is not one."""
    if len(client) != CLIENT_ID_BYTES:
        raise MessageError(f"a client's id has {CLIENT_ID_BYTES} bytes, this has {len(client)}")
    return client


def agreement(answer: pb.Welcome) -> Agreement:
    """What the client reads out of the server's welcome."""
    if answer.protocol != PROTOCOL:
        raise ProtocolMismatch(
            f"the server ({answer.software[:60]}) speaks protocol {answer.protocol}, this client "
            f"{PROTOCOL}: install the same version of splitlearn on both sides"
        )
    limits = answer.limits
    if not limits.chunk_bytes or not limits.max_message_bytes:
        raise MessageError(f"the server ({answer.software[:60]}) names no limits for its messages")
    return Agreement(
        codecs=frozenset(answer.codecs),
        checksum=answer.checksum == pb.XXH3_64,
        max_message_bytes=limits.max_message_bytes,
        chunk_bytes=limits.chunk_bytes,
        max_positions=limits.max_positions,
        attention=answer.attention,
        lanes=max(limits.lanes, 1),
        ticket=answer.ticket,
    )


def require_same_model(ours: ModelIdentity, theirs: ModelIdentity) -> None:
    """Raises SplitMismatch or ModelMismatch, in the server's words, where the two differ."""
    if ours == theirs:
        return
    if ours.config_hash == theirs.config_hash and ours.split != theirs.split:
        raise SplitMismatch(
            f"this server cuts the model {ours.split} (bottom/trunk/top), the client {theirs.split}: "
            f"give the client bottom_layers={ours.bottom_layers} and top_layers={ours.top_layers}",
            facts={"bottom_layers": ours.bottom_layers, "top_layers": ours.top_layers},
        )
    what = "configuration" if ours.config_hash != theirs.config_hash else "weights"
    raise ModelMismatch(
        f"this server holds the trunk of another model: its {what} differ from the client's "
        "(an instruct version is not its base): load the same folder or hub id on both sides"
    )


def identity_to_proto(identity: ModelIdentity) -> pb.Fingerprint:
    return pb.Fingerprint(
        config_hash=identity.config_hash,
        weights_hash=identity.weights_hash,
        bottom_layers=identity.bottom_layers,
        trunk_layers=identity.trunk_layers,
        top_layers=identity.top_layers,
    )


def identity_from_proto(proto: pb.Fingerprint) -> ModelIdentity:
    return ModelIdentity(
        config_hash=proto.config_hash,
        weights_hash=proto.weights_hash,
        bottom_layers=proto.bottom_layers,
        trunk_layers=proto.trunk_layers,
        top_layers=proto.top_layers,
    )


def limits_to_proto(facts: TrunkFacts, limits: WireLimits, answer_window: int) -> pb.Limits:
    return pb.Limits(
        max_message_bytes=limits.max_message_bytes,
        chunk_bytes=limits.chunk_bytes,
        max_rows=limits.max_rows,
        max_tokens=limits.max_tokens,
        session_tokens=facts.session_tokens,
        max_positions=facts.max_positions,
        lease_s=facts.lease_s,
        answer_window=answer_window,
        lanes=limits.lanes,
    )


def facts_to_proto(facts: TrunkFacts, limits: WireLimits, answer_window: int) -> pb.DescribeReply:
    return pb.DescribeReply(
        protocol=PROTOCOL,
        software=f"splitlearn/{__version__}",
        features=sorted(facts.features),
        fingerprint=identity_to_proto(_identity_of(facts)),
        precision=precision_to_proto(facts.precision),
        limits=limits_to_proto(facts, limits, answer_window),
        codecs=[codec.name for codec in CODECS],
        model_type=facts.model_type,
        hidden_size=facts.hidden_size,
        device=facts.device,
        attention=facts.attention,
        attention_reason=facts.attention_reason,
        batched=facts.batched,
        batched_reason=facts.batched_reason,
        kv_bytes_total=facts.kv_bytes_total,
        kv_bytes_free=facts.kv_bytes_free,
        sessions=facts.sessions,
        draining=facts.draining,
    )


def facts_from_proto(proto: pb.DescribeReply) -> TrunkFacts:
    identity = identity_from_proto(proto.fingerprint)
    return TrunkFacts(
        protocol=proto.protocol,
        software=proto.software,
        features=frozenset(proto.features),
        model_type=proto.model_type,
        hidden_size=proto.hidden_size,
        bottom_layers=identity.bottom_layers,
        trunk_layers=identity.trunk_layers,
        top_layers=identity.top_layers,
        config_hash=identity.config_hash,
        weights_hash=identity.weights_hash,
        precision=precision_from_proto(proto.precision),
        device=proto.device,
        attention=proto.attention,
        attention_reason=proto.attention_reason,
        batched=proto.batched,
        batched_reason=proto.batched_reason,
        session_tokens=proto.limits.session_tokens,
        max_positions=proto.limits.max_positions,
        lease_s=proto.limits.lease_s,
        kv_bytes_total=proto.kv_bytes_total,
        kv_bytes_free=proto.kv_bytes_free,
        sessions=proto.sessions,
        draining=proto.draining,
    )


def _identity_of(facts: TrunkFacts) -> ModelIdentity:
    return ModelIdentity(
        facts.config_hash, facts.weights_hash, facts.bottom_layers, facts.trunk_layers, facts.top_layers
    )


def _checksum_kind(greeting: pb.Hello, *, wanted: bool) -> pb.ChecksumKind:
    """xxh3 unless both sides can do without."""
    if not wanted and pb.NO_CHECKSUM in greeting.checksums:
        return pb.NO_CHECKSUM
    return pb.XXH3_64
