"""What a hostile or broken client sends is answered with its typed error, and nobody else notices."""

import gc
import math
import secrets
import time
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

from splitlearn.client.lane import STEPS
from splitlearn.config import WireLimits
from splitlearn.server.client_stream import ClientStream
from splitlearn.testing.pair import Pair, lively_model, served_pair
from splitlearn.testing.parity import read_in_pieces
from splitlearn.vocabulary import Precision, Role, StepKey
from splitlearn.wire.assembly import ChunkAssembly
from splitlearn.wire.checksum import checksum_of
from splitlearn.wire.chunks import CHUNK_OF, Pieces
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


def pieces_of(message: pb.ClientMessage, chunk_bytes: int) -> list[pb.ClientMessage]:
    whole, none = message.SerializeToString(), memoryview(b"")
    pieces = Pieces(pb.ClientMessage, 9, whole, none, chunk_bytes, checksum=True)
    return [pb.ClientMessage.FromString(piece) for piece in pieces]


class Wire:
    """A client that sends whatever it is told to."""

    def __init__(self, address: str, client: bytes | None = None, lane_of: bytes = b"") -> None:
        self.client = client or secrets.token_bytes(16)
        self._channel = grpc.insecure_channel(address)
        stub = rpc.TrunkStub(self._channel)
        self.fingerprint = stub.Describe(pb.DescribeRequest(), timeout=DEADLINE_S).fingerprint
        self._outgoing: SimpleQueue[pb.ClientMessage | None] = SimpleQueue()
        self._incoming: SimpleQueue[Any] = SimpleQueue()
        self._call = stub.Steps(iter(self._outgoing.get, None))
        Thread(target=self._read, daemon=True).start()
        greeting = hello(identity_from_proto(self.fingerprint), self.client, Precision(), checksum=True)
        greeting.lane_of = lane_of
        self.first = self.ask(pb.ClientMessage(hello=greeting))

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
        return self.ask(*pieces_of(message, LIMITS.chunk_bytes)).answer

    def close(self) -> None:
        self._outgoing.put(None)
        self._channel.close()


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


def piece(data: bytes, total_bytes: int = 0, offset: int = 0) -> pb.ClientMessage:
    return pb.ClientMessage(
        chunk=pb.Chunk(
            number=1,
            data=data,
            total_bytes=total_bytes or len(data),
            offset=offset,
            checksum=checksum_of(data),
        )
    )


STREAMS: dict[str, list[pb.ClientMessage]] = {
    "a second greeting": [pb.ClientMessage(hello=pb.Hello(protocol=1))],
    "an empty message": [pb.ClientMessage()],
    "a piece of an empty message": [pb.ClientMessage(chunk=pb.Chunk(number=1, data=b"x"))],
    "a piece of a huge message": [pb.ClientMessage(chunk=pb.Chunk(number=1, data=b"x", total_bytes=1 << 60))],
    "an empty piece": [pb.ClientMessage(chunk=pb.Chunk(number=1, total_bytes=10))],
    "a piece longer than was announced": [piece(b"xx", total_bytes=1)],
    "a piece beyond the end": [piece(b"x", total_bytes=10, offset=10)],
    "pieces that overlap": [piece(b"x" * 8, total_bytes=10), piece(b"xx", total_bytes=10, offset=5)],
    "pieces that disagree on their message": [piece(b"x", total_bytes=10), piece(b"x", total_bytes=11)],
    "pieces that form no message": [piece(b"\xff" * 20)],
    "pieces that form pieces": [piece(piece(b"x").SerializeToString())],
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
    in_pieces = wire.ask(*pieces_of(pb.ClientMessage(step=opening(session=6)), 50)).answer
    assert in_pieces.activation.data == in_one.activation.data != b""


# ---------------------------------------------------------------- lanes


def test_pieces_over_two_connections_in_any_order_are_the_step_in_one(pair: Pair, wire: Wire) -> None:
    in_one = wire.step(opening(session=5))
    lane = Wire(pair.server.address, wire.client, lane_of=wire.first.welcome.ticket)
    pieces = pieces_of(pb.ClientMessage(step=opening(session=6)), 50)
    for each in pieces[1::2]:
        lane._outgoing.put(each)
    answer = wire.ask(*pieces[0::2]).answer
    assert answer.activation.data == in_one.activation.data != b""
    lane.close()


@pytest.mark.parametrize("theirs", ["an unknown ticket", "another client's ticket"])
def test_a_lane_is_refused_with(pair: Pair, wire: Wire, theirs: str) -> None:
    other = Wire(pair.server.address)
    ticket = other.first.welcome.ticket if theirs == "another client's ticket" else secrets.token_bytes(16)
    assert ticket != wire.first.welcome.ticket
    lane = Wire(pair.server.address, wire.client, lane_of=ticket)
    assert isinstance(lane.first, grpc.RpcError)
    assert not other.step(opening()).HasField("error")
    for each in (lane, other):
        each.close()


def test_a_stream_has_no_more_lanes_than_the_server_allows(pair: Pair, wire: Wire) -> None:
    ticket = wire.first.welcome.ticket
    lanes = [Wire(pair.server.address, wire.client, lane_of=ticket) for _ in range(LIMITS.lanes)]
    *allowed, one_too_many = lanes
    assert all(lane.first.HasField("welcome") for lane in allowed)
    assert isinstance(one_too_many.first, grpc.RpcError)
    for lane in lanes:
        lane.close()


def test_a_close_behind_the_pieces_of_an_opening_closes_it_whichever_came_first(
    pair: Pair, wire: Wire
) -> None:
    """It comes over each connection, behind what that one carries."""
    lane = Wire(pair.server.address, wire.client, lane_of=wire.first.welcome.ticket)
    close = pb.ClientMessage(close=pb.CloseSession(session=6))
    opened = pair.engine.open_sessions
    pieces = pieces_of(pb.ClientMessage(step=opening(session=6)), 50)
    for each in (*pieces[0::2], close, pb.ClientMessage(step=opening(session=7))):
        wire._outgoing.put(each)
    assert wire._incoming.get(timeout=DEADLINE_S).answer.key.session == 7
    for each in (*pieces[1::2], close):
        lane._outgoing.put(each)
    assert wire._incoming.get(timeout=DEADLINE_S).answer.key.session == 6
    assert until(lambda: pair.engine.open_sessions == opened + 1)
    lane.close()


def test_a_lane_carries_pieces_only(wire: Wire, pair: Pair) -> None:
    lane = Wire(pair.server.address, wire.client, lane_of=wire.first.welcome.ticket)
    lane._outgoing.put(pb.ClientMessage(step=opening()))
    assert wire._incoming.get(timeout=DEADLINE_S).error.code == pb.MESSAGE


def test_a_lane_that_breaks_ends_its_stream_and_nobody_elses(pair: Pair, wire: Wire) -> None:
    """What it carried is lost: whoever waits for it must learn so."""
    honest = Wire(pair.server.address)
    lane = Wire(pair.server.address, wire.client, lane_of=wire.first.welcome.ticket)
    lane._call.cancel()
    assert wire._incoming.get(timeout=DEADLINE_S).error.code == pb.CORRUPT_FRAME
    assert not honest.step(opening()).HasField("error")
    honest.close()


def test_a_lane_that_is_never_read_does_not_fill_the_server(pair: Pair, wire: Wire) -> None:
    """It holds the one answer that it has a piece of; the others leave without it."""
    greeting = hello(identity_from_proto(wire.fingerprint), wire.client, Precision(), checksum=True)
    greeting.lane_of = wire.first.welcome.ticket
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16)]
    with grpc.insecure_channel(pair.server.address, options=narrow) as channel:
        outgoing: SimpleQueue[Any] = SimpleQueue()
        outgoing.put(pb.ClientMessage(hello=greeting))
        unread = rpc.TrunkStub(channel).Steps(iter(outgoing.get, None))
        assert next(unread).HasField("welcome")
        for number in range(1, 31):
            step = step_to_proto(StepMessage(StepKey(step=number), activation(5, 90)), RAW)
            for each in pieces_of(pb.ClientMessage(step=step), LIMITS.chunk_bytes):
                each.chunk.number = number
                wire._outgoing.put(each)
            little = step_to_proto(StepMessage(StepKey(step=100 + number), activation()), RAW)
            answer = wire.ask(pb.ClientMessage(step=little)).answer
            while answer.key.step != 100 + number:
                answer = wire._incoming.get(timeout=DEADLINE_S).answer
        assert until(lambda: len(answers_in_pieces()) <= 1, 5.0)
        outgoing.put(None)


def until(true: Callable[[], bool], deadline_s: float = DEADLINE_S) -> bool:
    end = time.monotonic() + deadline_s
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def answers_in_pieces() -> list[Pieces]:
    """Those that the server in this process holds."""
    return [
        each
        for each in gc.get_objects()
        if type(each) is Pieces and each._chunk_of == CHUNK_OF[pb.ServerMessage]
    ]


@pytest.mark.parametrize("over", ["a lane", "the stream"])
def test_what_the_server_fails_to_take_ends_the_stream(
    pair: Pair, wire: Wire, monkeypatch: pytest.MonkeyPatch, over: str
) -> None:
    """... and whoever waits for an answer learns so before the deadline."""
    lane = Wire(pair.server.address, wire.client, lane_of=wire.first.welcome.ticket)

    async def fail(stream: ClientStream, piece: pb.Chunk) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(ClientStream, "_take_piece", fail)
    sender = lane if over == "a lane" else wire
    sender._outgoing.put(piece(b"x"))
    assert wire._incoming.get(timeout=DEADLINE_S).error.code == pb.TRUNK_FAILED
    lane.close()


def test_what_is_no_message_at_all_ends_the_stream(pair: Pair, wire: Wire) -> None:
    greeting = hello(
        identity_from_proto(wire.fingerprint), secrets.token_bytes(16), Precision(), checksum=True
    )
    sent = iter([pb.ClientMessage(hello=greeting).SerializeToString(), b"\xff" * 10])
    with grpc.insecure_channel(pair.server.address) as channel:
        call = channel.stream_stream(
            STEPS, request_serializer=None, response_deserializer=pb.ServerMessage.FromString
        )
        _, error = call(sent, timeout=DEADLINE_S)
        assert error.error.code == pb.MESSAGE


def test_an_answer_larger_than_a_piece_comes_in_pieces(wire: Wire) -> None:
    step = opening(rows=3, tokens=90)
    assert step.ByteSize() > LIMITS.chunk_bytes
    assert len(wire.step(step).activation.data) == 3 * 90 * HIDDEN * 4
