"""What a vendor's 2:4 library looks like from here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from slope_dist.sparse.kernels.problem import Problem


class VendorError(Exception):
    """A library is missing, or refuses a call."""


class Algorithm(Protocol):
    """One way in which a library computes a product; `str` names it."""

    @property
    def deterministic(self) -> bool:
        """Whether the same operands always give the same bits."""


class Vendor(Protocol):
    """A library that multiplies 2:4 weights on one device; `note` is what a user should know of it, or ""."""

    name: str
    version: str
    note: str

    def unsupported(self, problem: Problem) -> str | None:
        """Why it cannot compute a problem, or None."""

    def metadata_layout(self, rows: int, columns: int, dtype: torch.dtype) -> Any:
        """Where it keeps each group's code."""

    def algorithms(self, problem: Problem) -> Sequence[Any]:
        """What it can compute a problem with."""

    def product(
        self,
        x: Tensor,
        values: Tensor,
        indices: Tensor,
        metadata: Tensor | None,
        algorithm: Any,
        *,
        bias: Tensor | None = None,
        addend: Tensor | None = None,
    ) -> Tensor:
        """Y [T, O] = X [T, I] W^T (+ bias [O]) (+ addend [T, O])."""
