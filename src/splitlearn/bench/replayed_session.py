"""A client that computes nothing: it opens one session and sends kept activations, step after step."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from dataclasses import dataclass
from typing import Any

import grpc
import torch

from splitlearn.client.grpc_errors import error_of
from splitlearn.client.lane import STEPS
from splitlearn.client.session import SESSION_BITS
from splitlearn.errors import MessageError, StepTimeout, TrunkUnreachable
from splitlearn.vocabulary import Precision, Role
from splitlearn.wire.chunks import STREAM_OPTIONS
from splitlearn.wire.dtypes import dtype_named
from splitlearn.wire.frames import APART_BYTES, FrameFormat, encode_frame
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.handshake import CLIENT_ID_BYTES, Agreement, ModelIdentity, agreement, hello
from splitlearn.wire.messages import TrunkFacts
from splitlearn.wire.status import error_from_proto

STEP_S = 60.0
# A connection for each session, as separate clients have.
OPTIONS = (*STREAM_OPTIONS, ("grpc.use_local_subchannel_pool", 1))


@dataclass(frozen=True, slots=True)
class Replay:
    """A session's text: its prompt, and the length at which it is cropped back to that."""

    prompt_tokens: int
    text_tokens: int


def _channel(address: str) -> Any:
    """Bytes go in and come out as they are; made within the event loop that uses it."""
    return grpc.aio.insecure_channel(address, options=OPTIONS)


class ReplayedSession:
    """One stream with one session, which never outgrows its text."""

    def __init__(self, address: str, facts: TrunkFacts, replay: Replay) -> None:
        self.number = 0
        self.is_lost = True
        """Whether it must be opened anew before its next step."""
        self._address, self._facts, self._replay = address, facts, replay
        self._length = 0

    async def open(self) -> None:
        """Raises the server's error where it takes no further client or session."""
        self._channel = _channel(self._address)
        self._call = self._channel.stream_stream(STEPS)()
        self._agreement = await self._greet()
        self._one_token = self._message(1)
        await self.reopen()

    async def reopen(self) -> None:
        """Begin a new session with its prompt, in steps that are small enough for one message each."""
        self.number = secrets.randbits(SESSION_BITS) | 1
        self._step = self._length = 0
        left = self._replay.prompt_tokens
        while left:
            tokens = min(left, self._tokens_at_once)
            await self._ask(self._message(tokens), tokens)
            left -= tokens
        self.is_lost = False

    async def step(self) -> pb.Answer:
        """One new token, after cropping where the text is full; raises what the server answers with."""
        step = self._one_token.step
        if self._length >= self._replay.text_tokens:
            step.keep_positions = self._length = self._replay.prompt_tokens
        answer = await self._ask(self._one_token, 1)
        step.ClearField("keep_positions")
        return answer

    async def close(self) -> None:
        """Free what it holds on the server, if that is still there."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            close = pb.CloseSession(session=self.number)
            await self._call.write(pb.ClientMessage(close=close).SerializeToString())
            await self._call.done_writing()
            # The server ends the stream once it has read all of it.
            while isinstance(await self._call.read(), bytes):
                pass
        await self._channel.close()

    async def _ask(self, message: pb.ClientMessage, tokens: int) -> pb.Answer:
        step = message.step
        step.key.session, step.key.step, step.acked_through = self.number, self._step + 1, self._step
        if not self._step:
            step.open.SetInParent()
        answer = (await self._exchange(message)).answer
        if answer.HasField("error"):
            raise error_from_proto(answer.error)
        self._step += 1
        self._length += tokens
        return answer

    async def _greet(self) -> Agreement:
        facts = self._facts
        identity = ModelIdentity(
            facts.config_hash, facts.weights_hash, facts.bottom_layers, facts.trunk_layers, facts.top_layers
        )
        greeting = hello(identity, secrets.token_bytes(CLIENT_ID_BYTES), Precision(), checksum=True)
        return agreement((await self._exchange(pb.ClientMessage(hello=greeting))).welcome)

    async def _exchange(self, message: pb.ClientMessage) -> pb.ServerMessage:
        try:
            async with asyncio.timeout(STEP_S):
                await self._call.write(message.SerializeToString())
                data = await self._call.read()
        except TimeoutError:
            raise StepTimeout(f"{self._address} did not answer within {STEP_S:g} s") from None
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise await self._why_it_ended() from None
        if not isinstance(data, bytes):
            raise TrunkUnreachable(f"{self._address} ended the connection")
        received = pb.ServerMessage.FromString(data)
        if received.HasField("error"):
            raise error_from_proto(received.error)
        return received

    async def _why_it_ended(self) -> Exception:
        try:
            await self._call.read()
        except grpc.aio.AioRpcError as error:
            return error_of(error, self._address, connected=bool(self.number))
        return TrunkUnreachable(f"the connection to {self._address} broke")

    @property
    def _tokens_at_once(self) -> int:
        """So many that neither the step nor its answer comes in pieces."""
        bytes_a_token = self._facts.hidden_size * self._dtype.itemsize
        return max((APART_BYTES - 1) // bytes_a_token, 1)

    @property
    def _dtype(self) -> torch.dtype:
        return dtype_named(self._facts.precision.weights)

    def _message(self, tokens: int) -> pb.ClientMessage:
        """Random activations do: what a text says does not change what its step costs."""
        draw = torch.Generator().manual_seed(tokens)
        activation_BTD = torch.randn(1, tokens, self._facts.hidden_size, generator=draw).to(self._dtype)
        frame = encode_frame(activation_BTD, Role.ACTIVATION, FrameFormat(checksum=self._agreement.checksum))
        if frame.ByteSize() > self._agreement.chunk_bytes:
            raise MessageError(f"a token of {frame.ByteSize():,} bytes is more than a message of this server")
        return pb.ClientMessage(step=pb.Step(activation=frame, deadline_s=STEP_S))
