"""A frame gives back the tensor that went in, or says why not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitlearn.errors import CorruptFrame, FrameError
from splitlearn.vocabulary import CodecId, Role
from splitlearn.wire.frames import FrameFormat, decode_frame, encode_frame
from splitlearn.wire.generated import splitlearn_pb2 as pb

RAW = FrameFormat()
HALF = FrameFormat(CodecId.HALF)


def activation(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_raw_loses_nothing(dtype):
    sent = activation(2, 3, 8, dtype=dtype)
    arrived = decode_frame(encode_frame(sent, Role.ACTIVATION, RAW), Role.ACTIVATION, (2, 3, 8))
    assert torch.equal(sent, arrived)
    assert arrived.dtype == dtype


def test_half_sends_two_bytes_a_value_and_is_off_by_at_most_one_in_256():
    sent = activation(2, 3, 8)
    frame = encode_frame(sent, Role.ACTIVATION, HALF)
    arrived = decode_frame(frame, Role.ACTIVATION, (2, 3, 8))
    assert len(frame.data) == 2 * sent.numel()
    assert arrived.dtype == torch.float32
    assert ((arrived - sent).abs() <= sent.abs() / 256).all()
    assert not torch.equal(arrived, sent)


def test_a_tensor_that_is_not_contiguous_arrives_as_it_looks():
    sent = activation(3, 2, 8).transpose(0, 1)
    assert torch.equal(
        decode_frame(encode_frame(sent, Role.ACTIVATION, RAW), Role.ACTIVATION, (2, 3, 8)), sent
    )


def test_what_was_decoded_may_be_written_to():
    arrived = decode_frame(
        encode_frame(activation(1, 1, 4), Role.ACTIVATION, RAW), Role.ACTIVATION, (1, 1, 4)
    )
    arrived.add_(1)


def test_a_changed_byte_is_noticed():
    frame = encode_frame(activation(1, 2, 8), Role.ACTIVATION, RAW)
    frame.data = bytes([frame.data[0] ^ 1]) + frame.data[1:]
    with pytest.raises(CorruptFrame, match="checksum"):
        decode_frame(frame, Role.ACTIVATION, (1, 2, 8))
    decode_frame(frame, Role.ACTIVATION, (1, 2, 8), checksum=False)


def test_a_frame_without_a_checksum_is_refused_where_one_was_agreed_on():
    frame = encode_frame(activation(1, 2, 8), Role.ACTIVATION, FrameFormat(checksum=False))
    with pytest.raises(CorruptFrame):
        decode_frame(frame, Role.ACTIVATION, (1, 2, 8))


BAD = {
    "another role": ({"role": pb.GRADIENT}, "says it is gradient"),
    "a role of a later version": ({"role": 99}, "not in the protocol"),
    "an integer activation": ({"dtype": pb.INT64}, "must be"),
    "an unknown dtype": ({"dtype": 77}, "dtype 77"),
    "no dtype": ({"dtype": 0}, "dtype 0"),
    "an unknown codec": ({"codec": 9}, "codec 9"),
    "a shape that is not expected": ({"shape": [1, 2, 9]}, "expected"),
    "too high a rank": ({"shape": [1] * 9}, "which no step has"),
    "a dimension beyond memory": ({"shape": [1, 2**31, 8]}, "which no step has"),
    "too few bytes": ({"data": b"\0" * 63}, "takes 64"),
    "too many bytes": ({"data": b"\0" * 65}, "takes 64"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_frame_that_is_malformed_is_refused_before_torch_sees_it(what):
    changes, words = BAD[what]
    frame = encode_frame(activation(1, 2, 8), Role.ACTIVATION, RAW)
    for field, value in changes.items():
        if field == "shape":
            del frame.shape[:]
            frame.shape.extend(value)
        else:
            setattr(frame, field, value)
    with pytest.raises(FrameError, match=words):
        decode_frame(frame, Role.ACTIVATION, (1, 2, 8))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_frame_error_or_the_tensor_they_describe(data):
    try:
        frame = pb.Frame.FromString(data)
    except Exception:
        return
    try:
        tensor = decode_frame(frame, Role.ACTIVATION, (None, None, 8))
    except FrameError:
        return
    assert tensor.shape[-1] == 8
