"""A large message arrives whole from its pieces; pieces that do not fit are refused."""

import pytest

from splitlearn.errors import MessageError
from splitlearn.wire.chunks import ChunkAssembly, chunks_of
from splitlearn.wire.generated import splitlearn_pb2 as pb

DATA = bytes(range(256)) * 5


@pytest.mark.parametrize("size", [1, 7, 256, len(DATA) - 1, len(DATA), len(DATA) + 1])
def test_pieces_of_any_size_form_the_message_again(size):
    assembly = ChunkAssembly(len(DATA))
    results = [assembly.add(chunk) for chunk in chunks_of(1, DATA, size)]
    assert results[-1] == DATA
    assert all(result is None for result in results[:-1])


def test_one_message_after_another():
    assembly = ChunkAssembly(len(DATA))
    for number in (1, 2, 3):
        assert [assembly.add(chunk) for chunk in chunks_of(number, DATA, 500)][-1] == DATA


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
