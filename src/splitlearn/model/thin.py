"""Matrices as products of two thin ones: added up, made thinner and measured without being multiplied out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# O out   I in   R rank

SMALLEST = float(torch.finfo(torch.float32).eps)
"""Singular values below this part of the largest are roundings."""


@dataclass(frozen=True, slots=True, eq=False)
class Thin:
    """The matrix up_OR @ down_RI, as LoRA's B and A are one."""

    up_OR: Tensor
    down_RI: Tensor

    @property
    def rank(self) -> int:
        return len(self.down_RI)

    @property
    def nbytes(self) -> int:
        return self.up_OR.nbytes + self.down_RI.nbytes

    def dense(self) -> Tensor:
        """(O, I), in float32."""
        return self.up_OR.float() @ self.down_RI.float()


def combined(parts: Sequence[Thin], factors: Sequence[float]) -> Thin:
    """The sum of factor x matrix, in float64; its rank is that of all parts together."""
    ups = [part.up_OR.double() * factor for part, factor in zip(parts, factors, strict=True)]
    return Thin(torch.cat(ups, dim=1), torch.cat([part.down_RI.double() for part in parts]))


def accumulated(before: Thin, change: Thin) -> Thin:
    """Their sum, in float32; what is no longer thin is multiplied out, beside a unit matrix.

    So neither memory nor time grows with the number of changes.
    """
    both = Thin(torch.cat([before.up_OR, change.up_OR], dim=1), torch.cat([before.down_RI, change.down_RI]))
    out, into = len(both.up_OR), both.down_RI.shape[1]
    if both.rank <= min(out, into):
        return both
    unit = torch.eye(min(out, into), device=both.up_OR.device)
    return Thin(unit, both.dense()) if out < into else Thin(both.dense(), unit)


def norm(matrix: Thin) -> float:
    """Its Frobenius norm."""
    return float(torch.linalg.matrix_norm(_core(matrix)[1]))


def thinned(matrix: Thin, floor: float = 0.0) -> Thin:
    """The same matrix, in float32, of the lowest rank that it can have; 0 where it is nothing.

    Q R = up, Q' R' = down^T, and the singular values of R R'^T are the matrix's. What is left tells the
    matrix and nothing of the parts that it was added up from.

    Args:
        floor: singular values up to this are left out, too.
    """
    up, core, down = _core(matrix)
    left, sizes, right = torch.linalg.svd(core, full_matrices=False)
    keep = sizes > max(floor, SMALLEST * float(sizes[0]) if len(sizes) else 0.0)
    root = sizes[keep].sqrt()
    up_OR = (up @ left[:, keep]) * root
    down_RI = root[:, None] * (right[keep] @ down)
    return Thin(up_OR.float().contiguous(), down_RI.float().contiguous())


def _core(matrix: Thin) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal columns, a small matrix, orthonormal rows, whose product it is; in float64."""
    up, above = torch.linalg.qr(matrix.up_OR.double())
    down, below = torch.linalg.qr(matrix.down_RI.double().T)
    return up, above @ below.T, down.T


def root_of_squares(norms: Sequence[float]) -> float:
    """The norm of several matrices taken as one."""
    return math.sqrt(sum(each * each for each in norms))
