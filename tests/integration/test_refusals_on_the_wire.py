"""What a hostile or broken client sends is answered with its typed error, and nobody else notices."""

import math
import secrets
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Thread
from typing import Any

import grpc
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from splitlearn.config import WireLimits
from splitlearn.testing.pair import Pair, lively_model, served_pair
from splitlearn.testing.parity import read_in_pieces
from splitlearn.vocabulary import Precision, Role, StepKey
from splitlearn.wire.chunks import ChunkAssembly, pieces_with_payload
from splitlearn.wire.frames import FrameFormat, encode_frame
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.generated import splitlearn_pb2_grpc as rpc
from splitlearn.wire.handshake import hello, identity_from_proto
from splitlearn.wire.messages import OpenSession, StepMessage
from splitlearn.wire.steps import step_to_proto

DEADLINE_S = 20.0
HIDDEN = 32
RAW = FrameFormat()
IDS = torch.randint(4, 128, (1, 12), generator=torch.Generator().manual_seed(1))
LIMITS = WireLimits(max_rows=8, max_tokens=512, max_message_bytes=1 << 20, chunk_bytes=1 << 14)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with served_pair(lively_model("llama", tmp_path_factory.mktemp("model")), limits=LIMITS) as pair:
        yield pair


class Wire:
    """A client that sends whatever it is told to."""

    def __init__(self, address: str, client: bytes | None = None) -> None:
        self.client = client or secrets.token_bytes(16)
        self._channel = grpc.insecure_channel(address)
        stub = rpc.TrunkStub(self._channel)
        fingerprint = stub.Describe(pb.DescribeRequest(), timeout=DEADLINE_S).fingerprint
        self._outgoing: SimpleQueue[pb.ClientMessage | None] = SimpleQueue()
        self._incoming: SimpleQueue[Any] = SimpleQueue()
        self._call = stub.Steps(iter(self._outgoing.get, None))
        Thread(target=self._read, daemon=True).start()
        greeting = hello(identity_from_proto(fingerprint), self.client, Precision(), checksum=True)
        assert self.ask(pb.ClientMessage(hello=greeting)).HasField("welcome")

    def _read(self) -> None:
        try:
            assembly = ChunkAssembly(LIMITS.max_message_bytes)
            for message in self._call:
                if not message.HasField("chunk"):
                    self._incoming.put(message)
                elif (whole := assembly.add(message.chunk)) is not None:
                    message = pb.ServerMessage.FromString(whole.message)
                    if whole.payload is not None:
                        message.answer.activation.data = whole.payload.numpy().tobytes()
                    self._incoming.put(message)
            self._incoming.put(None)
        except grpc.RpcError as error:
            self._incoming.put(error)

    def ask(self, *messages: pb.ClientMessage) -> Any:
        for message in messages:
            self._outgoing.put(message)
        return self._incoming.get(timeout=DEADLINE_S)

    def step(self, step: pb.Step) -> pb.Answer:
        """In pieces, where it is larger than one."""
        message = pb.ClientMessage(step=step)
        if message.ByteSize() <= LIMITS.chunk_bytes:
            return self.ask(message).answer
        return self.ask(*in_pieces(1, message, LIMITS.chunk_bytes)).answer

    def close(self) -> None:
        self._outgoing.put(None)
        self._channel.close()


def in_pieces(number: int, message: pb.ClientMessage, size: int) -> list[pb.ClientMessage]:
    pieces = pieces_with_payload(pb.ClientMessage, number, message.SerializeToString(), memoryview(b""), size)
    return [pb.ClientMessage.FromString(piece) for piece in pieces]


@pytest.fixture
def wire(pair: Pair) -> Iterator[Wire]:
    wire = Wire(pair.server.address)
    yield wire
    wire.close()


def activation(rows: int = 1, tokens: int = 3) -> Tensor:
    return torch.randn(rows, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))


def opening(session: int = 77, rows: int = 1, tokens: int = 3) -> pb.Step:
    key = StepKey(session=session, step=1)
    return step_to_proto(StepMessage(key, activation(rows, tokens), open=OpenSession()), RAW)


def following(session: int = 77, number: int = 2, rows: int = 1, tokens: int = 1) -> pb.Step:
    key = StepKey(session=session, step=number)
    return step_to_proto(StepMessage(key, activation(rows, tokens)), RAW)


# ---------------------------------------------------------------- one wrong field


def with_frame(frame: Tensor, role: Role, field: str) -> Callable[[pb.Step], None]:
    return lambda step: getattr(step, field).CopyFrom(encode_frame(frame, role, RAW))


def shaped(*shape: int) -> Callable[[pb.Step], None]:
    def change(step: pb.Step) -> None:
        step.activation.shape[:] = shape

    return change


def flipped(step: pb.Step) -> None:
    data = bytearray(step.activation.data)
    data[5] ^= 1
    step.activation.data = bytes(data)


def put(path: str, value: Any) -> Callable[[pb.Step], None]:
    """Set a field; a list is put in place of what is there."""
    *owners, name = path.split(".")

    def change(step: pb.Step) -> None:
        owner: Any = step
        for each in owners:
            owner = getattr(owner, each)
        if isinstance(value, list):
            getattr(owner, name)[:] = value
        else:
            setattr(owner, name, value)

    return change


POSITIONS = {"role": Role.POSITIONS, "field": "positions"}
MASK = {"role": Role.MASK_COLUMNS, "field": "mask_columns"}
NOT_A_TRUTH = encode_frame(torch.ones(1, 1, dtype=torch.uint8) * 2, Role.MASK_COLUMNS, RAW)
NOT_A_TRUTH.dtype = pb.BOOL

CHANGES: dict[str, tuple[Callable[[pb.Step], None], int]] = {
    "no activation": (lambda step: step.ClearField("activation"), pb.FRAME),
    "no dtype": (put("activation.dtype", pb.DTYPE_UNSPECIFIED), pb.FRAME),
    "a dtype that is not in the protocol": (put("activation.dtype", 99), pb.FRAME),
    "an integer activation": (put("activation.dtype", pb.INT32), pb.FRAME),
    "a dtype of half the size": (put("activation.dtype", pb.BFLOAT16), pb.FRAME),
    "rank 1": (shaped(HIDDEN), pb.FRAME),
    "rank 5": (shaped(1, 1, 1, 1, HIDDEN), pb.FRAME),
    "rank 100": (shaped(*[1] * 100), pb.FRAME),
    "no rows": (shaped(0, 1, HIDDEN), pb.FRAME),
    "no tokens": (shaped(1, 0, HIDDEN), pb.FRAME),
    "huge rows": (shaped((1 << 32) - 1, 1, HIDDEN), pb.FRAME),
    "huge tokens": (shaped(1, (1 << 32) - 1, HIDDEN), pb.FRAME),
    "a product that overflows": (shaped(8, 1 << 31, 1 << 31), pb.FRAME),
    "another hidden size": (shaped(1, 1, HIDDEN // 2), pb.FRAME),
    "too few bytes": (put("activation.data", b"\0" * 8), pb.FRAME),
    "too many bytes": (put("activation.data", b"\0" * 1000), pb.FRAME),
    "no bytes": (put("activation.data", b""), pb.FRAME),
    "a gradient in the activation's place": (put("activation.role", pb.GRADIENT), pb.FRAME),
    "a role that is not in the protocol": (put("activation.role", 55), pb.FRAME),
    "a codec that is not in the protocol": (put("activation.codec", 44), pb.FRAME),
    "another codec than the bytes are in": (put("activation.codec", pb.HALF), pb.FRAME),
    "a changed byte": (flipped, pb.CORRUPT_FRAME),
    "a wrong checksum": (put("activation.checksum", 1234), pb.CORRUPT_FRAME),
    "no checksum": (put("activation.checksum", 0), pb.CORRUPT_FRAME),
    "a deadline that is no number": (put("deadline_s", math.nan), pb.MESSAGE),
    "an endless deadline": (put("deadline_s", math.inf), pb.MESSAGE),
    "a deadline before now": (put("deadline_s", -1.0), pb.MESSAGE),
    "a row that the session lacks": (put("select_rows", [1]), pb.MESSAGE),
    "a row beyond any": (put("select_rows", [(1 << 32) - 1]), pb.MESSAGE),
    "more rows than the activation has": (put("select_rows", [0, 0]), pb.MESSAGE),
    "more kept than held": (put("keep_positions", 4), pb.MESSAGE),
    "far more kept than held": (put("keep_positions", (1 << 64) - 1), pb.MESSAGE),
    "negative positions": (
        with_frame(torch.tensor([[-1]], dtype=torch.int32), **POSITIONS),
        pb.MESSAGE,
    ),
    "positions that the model lacks": (
        with_frame(torch.tensor([[256]], dtype=torch.int32), **POSITIONS),
        pb.SESSION_TOO_LONG,
    ),
    "positions of another dtype": (with_frame(torch.tensor([[3]]), **POSITIONS), pb.FRAME),
    "positions of another shape": (
        with_frame(torch.tensor([[3, 4]], dtype=torch.int32), **POSITIONS),
        pb.FRAME,
    ),
    "a mask of another dtype": (with_frame(torch.ones(1, 1), **MASK), pb.FRAME),
    "a mask of another shape": (with_frame(torch.ones(1, 4, dtype=torch.bool), **MASK), pb.FRAME),
    "a mask that is neither true nor false": (
        lambda step: step.mask_columns.CopyFrom(NOT_A_TRUTH),
        pb.FRAME,
    ),
    "a run that is not there": (lambda step: step.key.CopyFrom(pb.StepKey(run=3, step=1)), pb.RUN_LOST),
    "a session and a run": (put("key.run", 3), pb.MESSAGE),
    "a gradient's phase": (put("key.phase", pb.BACKWARD), pb.MESSAGE),
    "a phase that is not in the protocol": (put("key.phase", 77), pb.MESSAGE),
    "a session that is not there": (put("key.session", 78), pb.SESSION_LOST),
    "another incarnation": (put("key.incarnation", 5), pb.SESSION_LOST),
    "no session, and something to keep": (
        lambda step: (step.ClearField("key"), put("keep_positions", 1)(step)),
        pb.MESSAGE,
    ),
    "a step that skips one": (put("key.step", 3), pb.STEP_OUT_OF_ORDER),
    "step 0": (put("key.step", 0), pb.STEP_OUT_OF_ORDER),
    "a step far ahead": (put("key.step", (1 << 64) - 1), pb.STEP_OUT_OF_ORDER),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_step_is_refused_for(pair: Pair, wire: Wire, what: str) -> None:
    """... the one field in which it is malformed; the same session then goes on as if nothing had been."""
    change, code = CHANGES[what]
    honest = Wire(pair.server.address)
    for each in (wire, honest):
        assert not each.step(opening()).HasField("error")
    step = following()
    change(step)
    answer = wire.step(step)
    assert pb.ErrorCode.Name(answer.error.code) == pb.ErrorCode.Name(code)
    assert answer.error.message
    after = [each.step(following()) for each in (wire, honest)]
    assert after[0].activation.data == after[1].activation.data != b""
    honest.close()


OPENINGS: dict[str, tuple[Callable[[pb.Step], None], int]] = {
    "no number": (put("key.session", 0), pb.MESSAGE),
    "a second step": (put("key.step", 2), pb.MESSAGE),
    "something to keep": (put("keep_positions", 1), pb.MESSAGE),
    "rows to select": (put("select_rows", [0]), pb.MESSAGE),
    "an adapter that is not here": (put("open.adapter.adapter", "poet"), pb.ADAPTER),
    "weights of another dtype": (put("open.precision.weights", pb.BFLOAT16), pb.SETTING),
    "a dtype that is not in the protocol": (put("open.precision.weights", 99), pb.MESSAGE),
    "autocast to an integer": (put("open.precision.autocast", pb.INT64), pb.SETTING),
    "more tokens than a session holds": (
        lambda step: step.activation.CopyFrom(encode_frame(activation(1, 97), Role.ACTIVATION, RAW)),
        pb.SESSION_TOO_LONG,
    ),
    "more rows than the server takes": (
        lambda step: step.activation.CopyFrom(encode_frame(activation(9, 1), Role.ACTIVATION, RAW)),
        pb.FRAME,
    ),
    "more tokens than the server takes": (
        lambda step: step.activation.CopyFrom(encode_frame(activation(8, 65), Role.ACTIVATION, RAW)),
        pb.FRAME,
    ),
}


@pytest.mark.parametrize("what", OPENINGS)
def test_a_session_is_not_opened_with(pair: Pair, wire: Wire, what: str) -> None:
    change, code = OPENINGS[what]
    free = pair.engine.kv.free_bytes
    step = opening()
    change(step)
    answer = wire.step(step)
    assert pb.ErrorCode.Name(answer.error.code) == pb.ErrorCode.Name(code)
    assert pair.engine.kv.free_bytes == free
    assert not wire.step(opening()).HasField("error")


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_step_of_random_fields_is_answered_and_nobody_else_notices(
    pair: Pair, wire: Wire, data: st.DataObject
) -> None:
    some = st.sampled_from([0, 1, 2, 3, 7, 31, 32, 96, 1 << 31, (1 << 32) - 1])
    step = opening(session=data.draw(some) + 1) if data.draw(st.booleans()) else following()
    step.activation.dtype = data.draw(st.integers(0, 9))
    step.activation.shape[:] = data.draw(st.lists(some, max_size=4))
    step.activation.data = data.draw(st.binary(max_size=400))
    step.activation.codec = data.draw(st.integers(0, 2))
    step.keep_positions = data.draw(some)
    step.select_rows[:] = data.draw(st.lists(some, max_size=3))
    step.key.step = data.draw(some)
    step.key.phase = data.draw(st.integers(0, 6))
    step.deadline_s = data.draw(st.floats(width=32))
    answer = wire.step(step)
    assert answer.HasField("error")
    assert answer.error.code != pb.TRUNK_FAILED


def test_after_all_this_an_honest_text_is_the_whole_models(pair: Pair, wire: Wire) -> None:
    for change, _ in CHANGES.values():
        step = following()
        change(step)
        wire.step(step)
    steps = (8, 1, 1, 2)
    assert torch.equal(read_in_pieces(pair.split, IDS, steps), read_in_pieces(pair.whole, IDS, steps))


# ---------------------------------------------------------------- streams

WHOLE = pb.ClientMessage(step=opening(tokens=90)).SerializeToString()
STREAMS: dict[str, list[pb.ClientMessage]] = {
    "a second greeting": [pb.ClientMessage(hello=pb.Hello(protocol=1))],
    "an empty message": [pb.ClientMessage()],
    "a piece of an empty message": [pb.ClientMessage(chunk=pb.Chunk(number=1, data=b"x", last=True))],
    "a piece of a huge message": [pb.ClientMessage(chunk=pb.Chunk(number=1, data=b"x", total_bytes=1 << 60))],
    "an empty piece": [pb.ClientMessage(chunk=pb.Chunk(number=1, total_bytes=10))],
    "more pieces than were announced": [
        pb.ClientMessage(chunk=pb.Chunk(number=1, data=b"xx", total_bytes=1))
    ],
    "pieces of two messages": [
        pb.ClientMessage(chunk=pb.Chunk(number=1, data=b"x", total_bytes=10)),
        pb.ClientMessage(chunk=pb.Chunk(number=2, data=b"x", total_bytes=10)),
    ],
    "pieces that end early": [
        pb.ClientMessage(chunk=pb.Chunk(number=1, data=WHOLE[:99], total_bytes=len(WHOLE), last=True))
    ],
    "pieces that form no message": [
        pb.ClientMessage(chunk=pb.Chunk(number=1, data=b"\xff" * 20, total_bytes=20, last=True))
    ],
    "pieces that form pieces": [
        pb.ClientMessage(chunk=pb.Chunk(number=1, data=inner, total_bytes=len(inner), last=True))
        for inner in [pb.ClientMessage(chunk=pb.Chunk(number=1, data=b"x")).SerializeToString()]
    ],
    "a fork into nothing": [pb.ClientMessage(fork=pb.ForkSession(session=1))],
    "a fork into itself": [pb.ClientMessage(fork=pb.ForkSession(session=1, into=1))],
}


@pytest.mark.parametrize("what", STREAMS)
def test_a_stream_or_its_message_is_refused_for(pair: Pair, wire: Wire, what: str) -> None:
    honest = Wire(pair.server.address)
    assert not honest.step(opening()).HasField("error")
    answer = wire.ask(*STREAMS[what])
    error = answer.forked.error if answer.HasField("forked") else answer.error
    assert pb.ErrorCode.Name(error.code) == "MESSAGE"
    assert not honest.step(following()).HasField("error")
    honest.close()


def test_closing_what_is_not_there_is_no_error(wire: Wire) -> None:
    wire._outgoing.put(pb.ClientMessage(close=pb.CloseSession(session=12345)))
    assert not wire.step(opening()).HasField("error")


# ---------------------------------------------------------------- sessions of others


def test_another_clients_session_cannot_be_reached_by_its_number(pair: Pair, wire: Wire) -> None:
    owner = Wire(pair.server.address)
    owner.step(opening(session=99))
    for step in (following(session=99), following(session=99, number=1)):
        assert wire.step(step).error.code == pb.SESSION_LOST
    fork = pb.ForkSession(session=99, into=100, at_step=1)
    assert wire.ask(pb.ClientMessage(fork=fork)).forked.error.code == pb.SESSION_LOST
    wire._outgoing.put(pb.ClientMessage(close=pb.CloseSession(session=99)))
    # Under the same number, it opens a session of its own.
    assert not wire.step(opening(session=99, tokens=5)).HasField("error")
    alone = Wire(pair.server.address)
    alone.step(opening(session=99))
    data = [each.step(following(session=99)).activation.data for each in (owner, alone)]
    assert data[0] == data[1] != b""
    owner.close()
    alone.close()


def test_the_same_client_reaches_its_session_over_a_second_stream(pair: Pair, wire: Wire) -> None:
    """Large steps travel on a connection of their own."""
    wire.step(opening())
    second = Wire(pair.server.address, wire.client)
    assert not second.step(following()).HasField("error")
    second.close()


# ---------------------------------------------------------------- steps asked twice, or out of order


def test_a_step_asked_again_is_answered_from_the_window_and_not_run_twice(pair: Pair, wire: Wire) -> None:
    first = wire.step(opening())
    second = wire.step(following())
    ran = pair.engine.ran.batches
    for step, answer in ((opening(), first), (following(), second)):
        again = wire.step(step)
        assert again.activation.data == answer.activation.data != b""
    assert pair.engine.ran.batches == ran
    other = Wire(pair.server.address)
    for step in (opening(), following()):
        other.step(step)
    after = [each.step(following(number=3)).activation.data for each in (wire, other)]
    assert after[0] == after[1] != b"", "the session grew once for each step"
    other.close()


def test_an_answer_that_was_acknowledged_is_no_longer_kept(wire: Wire) -> None:
    wire.step(opening())
    step = following()
    step.acked_through = 1
    wire.step(step)
    answer = wire.step(opening())
    assert (answer.error.code, answer.error.current_step) == (pb.STEP_OUT_OF_ORDER, 3)


def test_a_step_out_of_order_is_told_which_one_comes_next(wire: Wire) -> None:
    wire.step(opening())
    wire.step(following())
    answer = wire.step(following(number=7))
    assert (answer.error.code, answer.error.current_step) == (pb.STEP_OUT_OF_ORDER, 3)
    assert not wire.step(following(number=3)).HasField("error")


def test_a_step_in_pieces_is_the_step_in_one(pair: Pair, wire: Wire) -> None:
    """Control for the pieces that are refused above: those that fit together are taken."""
    in_one = wire.step(opening(session=5))
    pieces = in_pieces(9, pb.ClientMessage(step=opening(session=6)), 50)
    assert len(pieces) > 1
    answer = wire.ask(*pieces).answer
    assert answer.activation.data == in_one.activation.data != b""


def test_an_answer_larger_than_a_piece_comes_in_pieces(wire: Wire) -> None:
    step = opening(rows=3, tokens=90)
    assert step.ByteSize() > LIMITS.chunk_bytes
    assert len(wire.step(step).activation.data) == 3 * 90 * HIDDEN * 4
