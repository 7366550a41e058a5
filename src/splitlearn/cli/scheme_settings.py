"""What `splitlearn partition` is told beside its file; its options have these names."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt

from splitlearn.config import Settings
from splitlearn.errors import SettingError
from splitlearn.training.classes import LABEL
from splitlearn.training.partition import AT_LEAST, SHARDS_EACH

SchemeName = Literal["iid", "dirichlet", "shard", "field"]
OWN = {"alpha": "dirichlet", "min_examples": "dirichlet", "shards_each": "shard"}
"""Settings that one scheme alone reads."""
DEFAULTS: dict[SchemeName, dict[str, Any]] = {
    "iid": {},
    "dirichlet": {"by": LABEL, "min_examples": AT_LEAST},
    "shard": {"by": LABEL, "shards_each": SHARDS_EACH},
    "field": {"by": LABEL},
}


class PartitionSettings(Settings):
    """Decide, with the file, who gets which line."""

    clients: Annotated[int | None, Field(ge=1)] = None
    """How many clients there are; with `--scheme field` by default one for each value."""
    scheme: SchemeName = "iid"
    """"iid": all alike; "dirichlet": each class in shares that are drawn; "shard": few classes each; "field":
    each value whole at one client."""
    by: str | None = None
    """The field of a line that is its class, `label` by default ("iid" needs none); `length` goes by the
    text's length."""
    alpha: Annotated[float | None, Field(gt=0)] = None
    """How alike the clients of "dirichlet" are: 100 nearly as of "iid", 0.1 very different."""
    min_examples: Annotated[int | None, Field(ge=0)] = None
    """Examples that each client of "dirichlet" has at least; 2 by default."""
    shards_each: Annotated[int | None, Field(ge=1)] = None
    """Shards that each client of "shard" is dealt; 2 by default."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of all examples that no client gets, to measure on."""
    seed: NonNegativeInt = 0
    """The same seed, file and settings give the same files."""

    def filled_in(self) -> PartitionSettings:
        """With the defaults of what its scheme reads.

        Raises:
            SettingError: the scheme lacks a setting, or is told one that it does not read.
        """
        if self.clients is None and self.scheme != "field":
            raise SettingError("it is not said for how many: give --clients N")
        if self.alpha is None and self.scheme == "dirichlet":
            raise SettingError(
                "--scheme dirichlet needs an --alpha, for example 0.3: smaller is more different"
            )
        for name, scheme in OWN.items():
            if getattr(self, name) is not None and self.scheme != scheme:
                raise SettingError(
                    f"--{name.replace('_', '-')} has no effect with --scheme {self.scheme}: leave it out, "
                    f"or take --scheme {scheme}"
                )
        return PartitionSettings(**DEFAULTS[self.scheme] | self.told)

    @property
    def told(self) -> dict[str, Any]:
        """Those that have a value."""
        return self.model_dump(exclude_none=True)
