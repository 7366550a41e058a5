"""What only a split training can tell in its logs: the wire, and what was done again or left out."""

from __future__ import annotations

from splitlearn.client.remote_trunk import RemoteTrunk
from splitlearn.training.anomaly import AnomalyWatch

MB = 1e6


class SplitMetrics:
    """Figures for the trainer's log of a step, and so for TensorBoard and every other reporter."""

    def __init__(self, trunk: RemoteTrunk, anomalies: AnomalyWatch) -> None:
        self._trunk = trunk
        self._anomalies = anomalies
        self._sent = self._received = 0

    def begin(self) -> None:
        """What crossed the wire before, for example in an evaluation, is not the first step's."""
        self._sent, self._received = self._crossed()

    def now(self) -> dict[str, float]:
        """`wire_sent_mb` and `wire_received_mb` since the last log (millions of bytes); `forwarded_again`
        (what the tape had lost) and `anomalies` since the training began. Where ends are averaged also how
        often (`averages`), and what the last average lost (`aggregation_residual`).
        """
        sent, received = self._crossed()
        told = {
            "wire_sent_mb": (sent - self._sent) / MB,
            "wire_received_mb": (received - self._received) / MB,
            "forwarded_again": float(self._trunk.run.forwarded_again),
            "anomalies": float(self._anomalies.seen.total()),
        }
        if (average := self._trunk.last_average) is not None:
            told["averages"] = float(average.number)
            told["aggregation_residual"] = average.aggregation_residual
        self._sent, self._received = sent, received
        return told

    def _crossed(self) -> tuple[int, int]:
        traffic = self._trunk.transport.traffic
        received = traffic.received_bytes
        return traffic.message_bytes - received, received
