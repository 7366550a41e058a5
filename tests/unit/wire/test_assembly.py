"""A large message arrives whole from its pieces, in any order; pieces that do not fit are refused."""

import itertools
import random

import pytest
import torch

from splitlearn.errors import CorruptFrame, MessageError
from splitlearn.wire.assembly import LEAST_PIECE_BYTES, SMALL_PIECES, ChunkAssembly, Whole, parse
from splitlearn.wire.chunks import Pieces, deserialize_client
from splitlearn.wire.generated import splitlearn_pb2 as pb

MESSAGE = pb.ClientMessage(step=pb.Step(key=pb.StepKey(run=3, step=7), loss_scale=2.0))
HEAD = MESSAGE.SerializeToString()
PAYLOAD = bytes(range(251)) * 12
LIMIT = 20_000


def pieces(chunk_bytes=100, payload=PAYLOAD, number=9):
    cut = Pieces(pb.ClientMessage, number, HEAD, memoryview(payload), chunk_bytes, checksum=True)
    return [deserialize_client(piece) for piece in cut]


def chunk(start, size, total=15, number=1, tensor=0):
    return pb.Chunk(number=number, data=b"x" * size, total_bytes=total, offset=start, tensor_bytes=tensor)


@pytest.mark.parametrize("chunk_bytes", [1, 5, len(HEAD), 100, 999, 1 << 20])
@pytest.mark.parametrize("payload", [PAYLOAD, b""])
def test_a_message_arrives_whole_whatever_its_pieces_size_and_order(chunk_bytes, payload):
    assembly = ChunkAssembly(LIMIT)
    for seed in range(3):
        shuffled = pieces(chunk_bytes, payload)
        random.Random(seed).shuffle(shuffled)
        *parts, whole = map(assembly.add, shuffled)
        assert not any(parts)
        assert parse(pb.ClientMessage, whole.message) == MESSAGE
        assert (b"" if whole.payload is None else whole.payload.numpy().tobytes()) == payload
        assert whole.is_intact


def test_the_tensor_lies_where_any_dtype_may_lie():
    *_, whole = map(ChunkAssembly(LIMIT).add, pieces(payload=bytes(64)))
    assert whole.payload.view(torch.float64).numel() == 8
    assert whole.payload.data_ptr() % 8 == 0


def test_pieces_of_two_messages_may_come_mixed():
    assembly = ChunkAssembly(LIMIT)
    mixed = itertools.chain(*zip(pieces(number=1), pieces(number=2), strict=True))
    wholes = [whole for whole in map(assembly.add, mixed) if whole]
    assert len(wholes) == 2
    assert all(whole.payload.numpy().tobytes() == PAYLOAD for whole in wholes)


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(0, 1, total=0)],
        [chunk(0, 1, total=LIMIT + 1)],
        [chunk(0, 3, total=2)],
        [chunk(1, 2, total=2)],
        [chunk(0, 0)],
        [chunk(0, 15, tensor=15)],
        [chunk(0, 15, tensor=16)],
        [chunk(0, 5), chunk(5, 5, total=16)],
        [chunk(0, 5), chunk(5, 5, tensor=3)],
        [chunk(0, 5), chunk(0, 5)],
        [chunk(0, 10), chunk(5, 5)],
        [chunk(2, 8), chunk(3, 7)],
        [chunk(0, 10), chunk(10, 6)],
        [chunk(0, 1, total=LIMIT, number=n) for n in range(3)],
    ],
    ids=[
        "no length",
        "too long",
        "longer than said",
        "beyond the end",
        "empty",
        "a tensor without a message",
        "a tensor larger than all",
        "two lengths",
        "two lengths of a tensor",
        "sent twice",
        "overlapping",
        "overlapping, without a beginning",
        "one too many",
        "more begun than may be",
    ],
)
def test_pieces_that_do_not_fit_are_refused(chunks):
    assembly = ChunkAssembly(LIMIT, checksum=False)
    *fitting, last = chunks
    for each in fitting:
        assert assembly.add(each) is None
    with pytest.raises(MessageError):
        assembly.add(last)


def test_memory_grows_with_what_arrived_not_with_what_was_announced(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "splitlearn.wire.assembly.host_buffer",
        lambda size: asked.append(size) or torch.zeros(size, dtype=torch.uint8),
    )
    assembly = ChunkAssembly(LIMIT)
    arriving = pieces()
    quarter = len(arriving) // 4
    for piece in arriving[:quarter]:
        assembly.add(piece)
    assert not asked
    for piece in arriving[quarter:]:
        assembly.add(piece)
    assert len(asked) == 1


def one_byte_pieces(messages=1):
    """Of messages of which each would be the largest that may be; each piece the only one at its place."""
    total = LIMIT * 100 // messages
    return (chunk(at, 1, total=total, number=n) for at in range(total) for n in range(messages))


@pytest.mark.parametrize("messages", [1, 50], ids=["one message", "many messages"])
def test_what_is_held_does_not_grow_with_the_number_of_pieces(messages):
    """Of a piece of one byte hundreds are noted down."""
    assembly = ChunkAssembly(LIMIT * 100, checksum=False)
    arriving = one_byte_pieces(messages)
    for piece in itertools.islice(arriving, SMALL_PIECES):
        assert assembly.add(piece) is None
    further = map(assembly.add, itertools.islice(arriving, 2))
    with pytest.raises(MessageError, match="larger pieces"):
        list(further)


def test_pieces_that_are_small_are_forgotten_with_their_message():
    assembly = ChunkAssembly(LIMIT)
    for number in range(10):
        *_, whole = map(assembly.add, pieces(2, number=number))
        assert whole.payload.numpy().tobytes() == PAYLOAD


def test_a_message_of_any_size_may_come_in_pieces_of_4_kib():
    payload = bytes(LEAST_PIECE_BYTES * 2 * SMALL_PIECES)
    *_, whole = map(ChunkAssembly(1 << 30).add, pieces(LEAST_PIECE_BYTES, payload))
    assert whole.payload.numel() == len(payload)


def spoilt(piece):
    return piece._replace(data=memoryview(bytes([piece.data[0] ^ 1]) + bytes(piece.data[1:])))


def test_a_tensor_that_was_changed_on_its_way_is_told_from_one_that_was_not():
    assembly = ChunkAssembly(LIMIT)
    first, *rest, last = pieces()
    for piece in (first, *rest):
        assembly.add(piece)
    whole = assembly.add(spoilt(last))
    assert not whole.is_intact
    assert parse(pb.ClientMessage, whole.message) == MESSAGE


def test_a_message_that_was_changed_on_its_way_is_refused():
    with pytest.raises(CorruptFrame):
        ChunkAssembly(LIMIT).add(spoilt(pieces()[0]))


def test_without_checksums_a_change_goes_unnoticed():
    """Control: it is the checksum that tells."""
    assembly = ChunkAssembly(LIMIT, checksum=False)
    assert [assembly.add(spoilt(piece)) for piece in pieces(1 << 20, payload=b"")][-1] != Whole(HEAD, None)


@pytest.mark.parametrize("inner", [b"\xff" * 20, pb.ClientMessage(chunk=chunk(0, 1)).SerializeToString()])
def test_pieces_that_form_no_message_are_refused(inner):
    with pytest.raises(MessageError):
        parse(pb.ClientMessage, inner)
