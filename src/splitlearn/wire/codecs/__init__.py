"""How a tensor's values become bytes: one file a codec, all behind one protocol."""

from __future__ import annotations

from splitlearn.errors import FrameError
from splitlearn.vocabulary import CodecId
from splitlearn.wire.codecs.codec import Codec
from splitlearn.wire.codecs.half import HalfCodec
from splitlearn.wire.codecs.raw import RawCodec

CODECS: dict[CodecId, Codec] = {CodecId.RAW: RawCodec(), CodecId.HALF: HalfCodec()}


def codec_of(codec_id: CodecId) -> Codec:
    """The codec with this id.

    Raises:
        FrameError: this version has no such codec.
    """
    try:
        return CODECS[codec_id]
    except KeyError:
        known = ", ".join(known.name for known in CODECS)
        raise FrameError(f"codec {codec_id} is unknown here; agree on one of {known}") from None


__all__ = ["CODECS", "Codec", "HalfCodec", "RawCodec", "codec_of"]
