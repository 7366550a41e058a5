"""What `splitlearn train` is told of the cohort whose member it is; a simulation has the same names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from splitlearn.config import Settings
from splitlearn.errors import SettingError
from splitlearn.vocabulary import CohortSettings

RuleName = Literal["sync", "quorum", "async", "buffered"]
KEY_FILE = "member.key"
OWN = {
    "quorum": ("quorum",),
    "round_timeout": ("quorum",),
    "carry_late": ("quorum",),
    "buffer": ("buffered",),
    "staleness_exponent": ("quorum", "async", "buffered"),
    "staleness_limit": ("quorum", "async", "buffered"),
    "age_limit": ("quorum", "async", "buffered"),
}
"""Figures that not every rule reads, and the rules that do."""
AS_SETTINGS = {"round_timeout": "timeout_s", "age_limit": "age_limit_s"}


class CohortFigures(Settings):
    """How a rule makes rounds of the members' gradients; a figure that is left out is the rule's own."""

    quorum: Annotated[int | None, Field(gt=0)] = None
    """Members whose gradients are enough for a round once its timeout has passed."""
    round_timeout: Annotated[float | None, Field(gt=0)] = None
    """Seconds from a round's first gradient until a quorum closes it."""
    carry_late: bool | None = None
    """What comes too late for a quorum's round waits for the next one, and is not dropped."""
    buffer: Annotated[int | None, Field(gt=0)] = None
    """Gradients that make a round of "buffered"."""
    staleness_exponent: Annotated[float | None, Field(ge=0)] = None
    """A gradient that is s versions old counts (1 + s) ** -exponent; 0.5 by default."""
    staleness_limit: Annotated[int | None, Field(ge=0)] = None
    """Versions above which a gradient is refused and computed again; 16 by default."""
    age_limit: Annotated[float | None, Field(gt=0)] = None
    """Seconds above which it is."""
    weighting: Literal["tokens", "examples", "equal"] | None = None
    """What a member's gradient is weighted by; "tokens" by default."""
    clip_norm: Annotated[float | None, Field(ge=0)] = None
    """The norm that the trunk's merged gradient may have; by default it is not clipped."""

    @property
    def figures(self) -> dict[str, Any]:
        """Those that were told, by their options' names."""
        told = {name: getattr(self, name) for name in CohortFigures.model_fields}
        return {name: value for name, value in told.items() if value is not None}

    def cohort_of(self, rule: str, members: int, called: Callable[[str], str]) -> CohortSettings:
        """The cohort with these figures.

        Args:
            called: what its user calls a figure.

        Raises:
            SettingError: the rule does not read a figure, or they make no round.
        """
        from splitlearn.engine.rules import require_known

        for name in self.figures:
            if rule not in OWN.get(name, (rule,)):
                raise SettingError(
                    f"{called(name)} has no effect with the rule {rule}: leave it out, or take "
                    f"{' or '.join(OWN[name])}"
                )
        figures = {AS_SETTINGS.get(name, name): value for name, value in self.figures.items()}
        made = CohortSettings(rule, members, **figures)
        require_known(made)
        return made


class MemberOptions(Settings):
    """Whether a training is one member's of a cohort, and which one's."""

    cohort: RuleName | None = None
    """Train the run together with others who name it, too: the rule by which their gradients are merged."""
    members: Annotated[int | None, Field(gt=0)] = None
    """How many members the first round waits for."""
    member: str | None = None
    """What this member is called; nobody else in the cohort has the name."""
    member_key: Path | None = None
    """File with the secret by which the server knows this member again, made where there is none; by default
    `member.key` in the output folder."""

    def shared(self, run: str | None, figures: CohortFigures) -> CohortSettings | None:
        """The cohort; None for a training that nobody shares.

        Raises:
            SettingError: something is missing, or has no effect.
        """
        told = {"members": self.members, "member": self.member}
        if self.cohort is None:
            _require_none(told | {"member_key": self.member_key} | figures.figures)
            return None
        for name, value in {"run": run, **told}.items():
            if value is None:
                raise SettingError(f"--cohort needs {flag(name)}, too: {NEEDED[name]}")
        assert self.members is not None
        return figures.cohort_of(self.cohort, self.members, flag)


NEEDED = {
    "run": "the name of the training that all members share",
    "members": "how many the first round waits for",
    "member": "what this one of them is called",
}


def flag(name: str) -> str:
    """The option of this name."""
    return "--" + name.replace("_", "-")


def _require_none(told: Mapping[str, Any]) -> None:
    for name, value in told.items():
        if value is not None:
            raise SettingError(f"{flag(name)} has no effect without --cohort: name its rule, or leave it out")
