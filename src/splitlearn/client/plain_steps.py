"""Steps of no run: the next of a cache's session, or a lone forward without a cache."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from torch import Tensor

from splitlearn.client.call_context import Call
from splitlearn.client.remote_cache import session_of
from splitlearn.client.sent import positions_to_send, require_in_step, without_cache
from splitlearn.client.transport import Transport
from splitlearn.config import ClientConfig
from splitlearn.vocabulary import StepKey
from splitlearn.wire.host_memory import to_host
from splitlearn.wire.messages import AnswerMessage, OpenSession, StepMessage

# B rows   T new tokens   D hidden


class PlainSteps:
    """`opening` is what a session is opened with."""

    def __init__(
        self, transport: Transport, layers: range, config: ClientConfig, opening: Callable[[], OpenSession]
    ) -> None:
        self._transport, self._layers, self._config = transport, layers, config
        self._opening = opening
        self._numbers = count(1)

    def ask(self, activation_BTD: Tensor, call: Call) -> AnswerMessage:
        sent_BTD = to_host(activation_BTD)
        if call.cache is None:
            return self._lone_step(sent_BTD, call)
        session = session_of(call.cache, self._layers, self._transport, self._opening)
        require_in_step(call.cache, self._layers, session.length + sent_BTD.shape[1])
        positions_BT = positions_to_send(call, sent_BTD, session.length)
        return session.step(sent_BTD, call.mask_BL, positions_BT, self._deadline_s(sent_BTD))

    def _lone_step(self, sent_BTD: Tensor, call: Call) -> AnswerMessage:
        _, mask_BT, positions_BT = without_cache(sent_BTD, call)
        return self._transport.step(
            StepMessage(
                key=StepKey(step=next(self._numbers)),
                activation_BTD=sent_BTD,
                mask_columns_BT=mask_BT,
                positions_BT=positions_BT,
                deadline_s=self._deadline_s(sent_BTD),
            )
        )

    def _deadline_s(self, activation_BTD: Tensor) -> float:
        rows, tokens = activation_BTD.shape[:2]
        is_decode = rows * tokens <= self._config.decode_tokens
        return self._config.decode_s if is_decode else self._config.prefill_s
