"""Learning rates of their own for bottom, trunk and top, under one schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from splitlearn.client.parts import PARTS, parts_of
from splitlearn.client.remote_trunk import RemoteTrunk
from splitlearn.errors import SettingError

Group = dict[str, Any]


class PartRates:
    """The highest rate of each part: its own, or else the usual one.

    Raises:
        SettingError: a part is named that there is not.
    """

    def __init__(self, rates: Mapping[str, float] | None, usual: float) -> None:
        self._rates = dict(rates or {})
        self._usual = usual
        if unknown := self._rates.keys() - set(PARTS):
            raise SettingError(f"learning_rates names {', '.join(unknown)}: the parts are {', '.join(PARTS)}")

    def groups_by_part(self, groups: list[Group], model: nn.Module, trunk: RemoteTrunk) -> Iterator[Group]:
        """The client's optimizer groups, cut where bottom and top have rates of their own."""
        if not self._rates.keys() & {"bottom", "top"}:
            yield from groups
            return
        part_of = {id(parameter): part for part, parameter in parts_of(model, trunk)}
        for group in groups:
            for part in ("bottom", "top"):
                its = [each for each in group["params"] if part_of[id(each)] == part]
                yield group | {"params": its, "lr": self._rates.get(part, group["lr"]), "part": part}

    def of_trunk(self, groups: list[Group]) -> float:
        """The schedule's rate now, or as much of the trunk's own as the schedule leaves of a group's."""
        if not self._rates:
            return float(groups[0]["lr"])
        wanted = self._rates.get("trunk", self._usual)
        moving = next((group for group in groups if group.get("initial_lr", group["lr"])), None)
        if moving is None:
            return float(wanted)
        return float(wanted * moving["lr"] / moving.get("initial_lr", moving["lr"]))
