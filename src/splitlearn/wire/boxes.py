"""Which part of a session's keys and values goes in one message, and in which order they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from splitlearn.errors import MessageError


@dataclass(frozen=True, slots=True)
class Box:
    """Some whole rows of one layer, or some positions of one row."""

    layer: int
    first_row: int
    rows: int
    first_position: int
    positions: int

    @property
    def row_range(self) -> slice:
        return slice(self.first_row, self.first_row + self.rows)

    @property
    def position_range(self) -> slice:
        return slice(self.first_position, self.first_position + self.positions)


def boxes_of(rows: int, length: int, position_bytes: Sequence[int], part_bytes: int) -> Iterator[Box]:
    """All of a session, in boxes of about this size.

    Args:
        rows: of the session, each of `length` positions.
        position_bytes: what keys and values of one position of one row take, by layer.
        part_bytes: how much goes in one message; a position goes whole.
    """
    for layer, each_bytes in enumerate(position_bytes):
        together = part_bytes // (each_bytes * length)
        if together:
            for row in range(0, rows, together):
                yield Box(layer, row, min(together, rows - row), 0, length)
            continue
        positions = max(part_bytes // each_bytes, 1)
        for row in range(rows):
            for start in range(0, length, positions):
                yield Box(layer, row, 1, start, min(positions, length - start))


class BoxOrder:
    """Sees that the boxes that arrive are all there are, once each."""

    def __init__(self, layers: int, rows: int, length: int) -> None:
        self._layers, self._rows, self._length = layers, rows, length
        self._next = (0, 0, 0)

    def take(self, box: Box) -> None:
        """Raises MessageError where the box is not the next one, or reaches over its layer's edge."""
        layer, row, position = self._next
        is_next = (box.layer, box.first_row, box.first_position) == self._next and layer < self._layers
        ends_at = box.first_position + box.positions
        is_box = min(box.rows, box.positions) >= 1
        fits = is_box and row + box.rows <= self._rows and ends_at <= self._length
        is_whole = box.rows == 1 or box.positions == self._length
        if not (is_next and fits and is_whole):
            raise MessageError(
                f"a part of layer {box.layer} from row {box.first_row}, position {box.first_position} came "
                f"where layer {layer} from row {row}, position {position} was due: export the session again"
            )
        if ends_at < self._length:
            self._next = (layer, row, ends_at)
        elif row + box.rows < self._rows:
            self._next = (layer, row + box.rows, 0)
        else:
            self._next = (layer + 1, 0, 0)

    @property
    def is_complete(self) -> bool:
        return self._next[0] == self._layers
