"""One connection of a stream: a call, what is to be sent on it, and the thread that reads it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import grpc

from splitlearn.client.grpc_errors import error_of
from splitlearn.errors import MessageError, SplitLearnError, TrunkUnreachable
from splitlearn.wire.chunks import Piece, Pieces, deserialize_server, serialize
from splitlearn.wire.generated import splitlearn_pb2 as pb

STEPS = f"/{pb.DESCRIPTOR.services_by_name['Trunk'].full_name}/Steps"
Outgoing = pb.ClientMessage | Pieces
Incoming = pb.ServerMessage | Piece


class Lane:
    """Gives what arrives to `take`, in order, on a thread of its own; `ended` is called once, last.

    Args:
        channel: closed with the lane.
        address: for errors.
        take: what is done with each message behind the welcome.
        ended: told why the lane ended.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        address: str,
        take: Callable[[Incoming], None],
        ended: Callable[[Lane, SplitLearnError], None],
    ) -> None:
        self._channel = channel
        self._address = address
        self._take, self._ended = take, ended
        self._outgoing: SimpleQueue[Outgoing | None] = SimpleQueue()
        self._welcome: Future[pb.Welcome] = Future()
        self._call: Any = None
        self._is_cancelled = self._is_finished = False
        self.has_welcome = False
        """Whether the server knows this lane."""
        self.ended_in_order = False
        """Whether the server sent all that it had for this lane, and then ended it."""
        self._reader = threading.Thread(target=self._read, name="splitlearn answers", daemon=True)

    def greet(self, hello: pb.Hello, timeout_s: float) -> pb.Welcome:
        """Begin the call, and wait for the server's welcome.

        Raises:
            TimeoutError: it did not come in time; SplitLearnError: what ended the lane before it came.
        """
        self.send(pb.ClientMessage(hello=hello))
        begin = self._channel.stream_stream(
            STEPS, request_serializer=serialize, response_deserializer=deserialize_server
        )
        self._call = begin(self._requests())
        if self._is_cancelled:
            self._call.cancel()
        self._reader.start()
        return self._welcome.result(timeout_s)

    @property
    def takes_messages(self) -> bool:
        """Whether what is sent now leaves."""
        return self.has_welcome and not self._is_finished

    def send(self, outgoing: Outgoing) -> None:
        self._outgoing.put(outgoing)

    def finish(self) -> None:
        """Say that nothing more is sent: the server then ends the lane in order, behind what it has sent."""
        self._is_finished = True
        self._outgoing.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait until everything was read; not where this very thread would have to read it."""
        # A finalizer may run on any thread, this lane's own reader among them.
        if threading.current_thread() is not self._reader:
            self._reader.join(timeout_s)

    def cancel(self) -> None:
        """End the lane at once, whatever is on its way; one that has not begun yet, when it does."""
        self._is_cancelled = True
        if self._call is not None:
            self._call.cancel()

    def _requests(self) -> Iterator[pb.ClientMessage | bytes]:
        """On gRPC's sending thread: pieces are made as they leave, not all at once."""
        while (outgoing := self._outgoing.get()) is not None:
            if isinstance(outgoing, Pieces):
                yield from outgoing
            else:
                yield outgoing

    def _read(self) -> None:
        try:
            for message in self._call:
                self._receive(message)
            self.ended_in_order = True
            self._end(TrunkUnreachable(f"{self._address} ended the connection: is the server still running?"))
        except grpc.RpcError as error:
            self._end(error_of(error, self._address, connected=self.has_welcome))
        except SplitLearnError as error:
            self._end(error)
        except Exception as error:
            self._end(MessageError(f"{self._address} sent what cannot be read ({error}): try again"))
        finally:
            # So that gRPC's own sending thread ends, too.
            self._outgoing.put(None)
            self._call.cancel()
            self._channel.close()

    def _receive(self, message: Incoming) -> None:
        if self.has_welcome:
            self._take(message)
        elif isinstance(message, pb.ServerMessage) and message.HasField("welcome"):
            self.has_welcome = True
            self._welcome.set_result(message.welcome)
        else:
            raise MessageError(f"{self._address} does not begin with a welcome: is it a SplitLearn server?")

    def _end(self, error: SplitLearnError) -> None:
        if not self.has_welcome:
            self._welcome.set_exception(error)
        self._ended(self, error)
