"""A large message is cut into pieces that protobuf would read, once for all who send them."""

import threading
import time

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from splitlearn.wire.checksum import checksum_of
from splitlearn.wire.chunks import CHUNK_FIELDS, Piece, Pieces, deserialize_client, deserialize_server
from splitlearn.wire.generated import splitlearn_pb2 as pb

MESSAGE = pb.ClientMessage(step=pb.Step(key=pb.StepKey(run=3, step=7), loss_scale=2.0)).SerializeToString()
PAYLOAD = memoryview(bytes(range(251)) * 40)


def pieces(chunk_bytes: int) -> Pieces:
    return Pieces(pb.ClientMessage, 9, MESSAGE, PAYLOAD, chunk_bytes, checksum=True)


@pytest.mark.parametrize("chunk_bytes", [1, 5, len(MESSAGE), 100, 999, 1 << 20])
def test_our_pieces_are_what_protobuf_would_write(chunk_bytes):
    whole = MESSAGE + PAYLOAD
    covered = 0
    for piece in pieces(chunk_bytes):
        chunk, ours = pb.ClientMessage.FromString(piece).chunk, deserialize_client(piece)
        assert isinstance(ours, Piece)
        assert all(getattr(chunk, name) == getattr(ours, name) for name in CHUNK_FIELDS)
        assert (chunk.number, chunk.total_bytes, chunk.tensor_bytes) == (9, len(whole), len(PAYLOAD))
        assert chunk.data == whole[chunk.offset : chunk.offset + len(chunk.data)]
        assert chunk.checksum == checksum_of(chunk.data)
        covered += len(chunk.data)
    assert covered == len(whole)


def test_connections_side_by_side_send_each_piece_once():
    shared, sent = pieces(10), [[], []]
    threads = [threading.Thread(target=lambda each=each: each.extend(shared)) for each in sent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    offsets = [deserialize_client(piece).offset for each in sent for piece in each]
    assert sorted(offsets) == list(range(0, len(MESSAGE) + len(PAYLOAD), 10))


def test_a_checksum_is_that_of_the_parts_in_a_row_and_never_none():
    assert checksum_of(b"ab", b"c") == checksum_of(b"abc") != checksum_of(b"abd")
    assert checksum_of(b"") != 0


def test_a_chunk_that_protobuf_wrote_is_read_by_either():
    for chunk in (pb.Chunk(number=1, data=b"abc", total_bytes=3), pb.Chunk(), pb.Chunk(number=5)):
        data = pb.ServerMessage(chunk=chunk).SerializeToString()
        read = deserialize_server(data)
        read = read if isinstance(read, Piece) else read.chunk
        assert (read.number, bytes(read.data), read.total_bytes) == (
            chunk.number,
            chunk.data,
            chunk.total_bytes,
        )


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


def around(head: bytes, data: bytes = b"x") -> bytes:
    """One chunk: these bytes, and behind them its data."""
    inner = head + b"\x12" + bytes([len(data)]) + data
    length = bytes([len(inner) & 127 | 128, len(inner) >> 7 & 127 | 128, len(inner) >> 14])
    return b"\x2a" + length + inner


NUMBER = b"\x08\x01"


def test_a_field_that_comes_twice_is_left_to_protobuf():
    """... whose data are a copy: nothing of what stood around them is held."""
    assert isinstance(deserialize_client(around(NUMBER)), Piece)
    for head in (NUMBER * 2, NUMBER * 1000):
        read = deserialize_client(around(head))
        assert not isinstance(read, Piece)
        assert (read.chunk.number, read.chunk.data) == (1, b"x")


def test_little_stands_around_the_data_of_a_piece():
    """They are held as they lie: the rest with them."""
    widest = b"".join(bytes([field << 3]) + b"\xff" * 9 + b"\x01" for field in (1, 3, 4, 5, 6))
    read = deserialize_client(around(widest))
    assert isinstance(read, Piece)
    assert read.total_bytes == (1 << 64) - 1
    assert len(read.data.obj) - len(read.data) < 80


@pytest.mark.parametrize("padded", [b"\x88" + b"\x80" * 8 + b"\x00\x01", b"\x88\x80\x80\x80\x80\x00\x01"])
def test_a_field_of_more_bytes_than_it_may_have_is_refused_as_by_protobuf(padded):
    with pytest.raises(DecodeError):
        deserialize_client(around(padded))


def test_a_number_of_more_than_64_bits_is_read_as_protobuf_reads_it():
    head = b"\x08" + b"\xff" * 9 + b"\x7f"
    assert not isinstance(deserialize_client(around(head)), Piece)


def test_a_piece_of_a_mebibyte_of_head_is_read_at_once():
    """The server's event loop reads it, and serves nobody else meanwhile."""
    flood = around(NUMBER * (1 << 19))
    started = time.perf_counter()
    deserialize_client(flood)
    assert time.perf_counter() - started < 0.1
