"""A large message arrives whole from its pieces; pieces that do not fit are refused."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from splitlearn.errors import MessageError
from splitlearn.wire.chunks import (
    ChunkAssembly,
    Piece,
    Whole,
    deserialize_client,
    deserialize_server,
    pieces_with_payload,
)
from splitlearn.wire.generated import splitlearn_pb2 as pb

DATA = bytes(range(256)) * 5


def pieces_of(number: int, data: bytes, size: int) -> list[Piece]:
    """As they arrive."""
    sent = pieces_with_payload(pb.ClientMessage, number, data, memoryview(b""), size)
    return [deserialize_client(piece) for piece in sent]


@pytest.mark.parametrize("size", [1, 7, 256, len(DATA) - 1, len(DATA), len(DATA) + 1])
def test_pieces_of_any_size_form_the_message_again(size):
    assembly = ChunkAssembly(len(DATA))
    results = [assembly.add(chunk) for chunk in pieces_of(1, DATA, size)]
    assert results[-1] == Whole(DATA, None)
    assert all(result is None for result in results[:-1])


def test_one_message_after_another():
    assembly = ChunkAssembly(len(DATA))
    for number in (1, 2, 3):
        assert [assembly.add(chunk) for chunk in pieces_of(number, DATA, 500)][-1].message == DATA


@pytest.mark.parametrize(
    "chunks",
    [
        [pb.Chunk(number=1, data=b"a", total_bytes=0)],
        [pb.Chunk(number=1, data=b"a", total_bytes=10_000)],
        [pb.Chunk(number=1, data=b"abc", total_bytes=2)],
        [pb.Chunk(number=1, data=b"a", total_bytes=2, last=True)],
        [pb.Chunk(number=1, data=b"", total_bytes=2)],
        [pb.Chunk(number=1, data=b"a", total_bytes=2), pb.Chunk(number=2, data=b"b", last=True)],
        [pb.Chunk(number=1, data=b"a", total_bytes=2), pb.Chunk(number=1, data=b"b", total_bytes=2)],
    ],
    ids=["no length", "too long", "longer than said", "shorter than said", "empty", "mixed", "begun again"],
)
def test_pieces_that_do_not_fit_are_refused(chunks):
    assembly = ChunkAssembly(1000)
    *fitting, last = chunks
    for chunk in fitting:
        assembly.add(chunk)
    with pytest.raises(MessageError):
        assembly.add(last)


# ---------------------------------------------------------------- a tensor behind its message


MESSAGE = pb.ClientMessage(step=pb.Step(key=pb.StepKey(run=3, step=7), loss_scale=2.0))
PAYLOAD = memoryview(bytes(range(251)) * 40)


def pieces(chunk_bytes, payload=PAYLOAD, number=9):
    content = MESSAGE.SerializeToString()
    return list(pieces_with_payload(pb.ClientMessage, number, content, payload, chunk_bytes))


@pytest.mark.parametrize("chunk_bytes", [1, 5, len(MESSAGE.SerializeToString()), 100, 999, 1 << 20])
def test_a_tensor_behind_its_message_arrives_whole(chunk_bytes):
    assembly = ChunkAssembly(1 << 20)
    for _ in range(2):
        *parts, whole = [assembly.add(deserialize_client(piece)) for piece in pieces(chunk_bytes)]
        assert not any(parts)
        assert pb.ClientMessage.FromString(whole.message) == MESSAGE
        assert whole.payload.numpy().tobytes() == PAYLOAD


def test_our_pieces_are_what_protobuf_would_write():
    for piece in pieces(100):
        chunk, ours = pb.ClientMessage.FromString(piece).chunk, deserialize_client(piece)
        assert isinstance(ours, Piece)
        fields = ("number", "data", "total_bytes", "last", "tensor_bytes")
        assert all(getattr(chunk, field) == getattr(ours, field) for field in fields)


def test_a_chunk_that_protobuf_wrote_is_read_by_either():
    for chunk in (pb.Chunk(number=1, data=b"abc", total_bytes=3, last=True), pb.Chunk(), pb.Chunk(number=5)):
        data = pb.ServerMessage(chunk=chunk).SerializeToString()
        read = deserialize_server(data)
        read = read if isinstance(read, Piece) else read.chunk
        assert (read.number, bytes(read.data), read.total_bytes) == (
            chunk.number,
            chunk.data,
            chunk.total_bytes,
        )


def test_a_tensor_larger_than_its_message_is_refused():
    with pytest.raises(MessageError):
        ChunkAssembly(1000).add(pb.Chunk(number=1, data=b"ab", total_bytes=2, tensor_bytes=3, last=True))


@given(data=st.binary(max_size=60), chunk=st.booleans())
def test_bytes_of_any_kind_are_read_as_protobuf_reads_them_or_refused(data, chunk):
    """Nothing is read where protobuf would refuse, and what is read is what protobuf reads."""
    data = (b"\x2a" if chunk else b"") + data
    try:
        expected = pb.ClientMessage.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            deserialize_client(data)
        return
    read = deserialize_client(data)
    if isinstance(read, Piece):
        assert (read.number, bytes(read.data)) == (expected.chunk.number, expected.chunk.data)
    else:
        assert read == expected
