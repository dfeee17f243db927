"""What a vendor's library must offer to be one of the dispatcher's routes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from slope_dist.sparse.kernels.problem import Problem

NO_MEMORY = "no memory"
"""How a reason begins that is true of this moment alone, and is no reason to leave a way out another time."""


class VendorError(Exception):
    """A vendor's library is missing, or refuses what it was asked; one line."""


@dataclass(frozen=True)
class Algorithm:
    """One of a vendor's ways to compute a product, as plain numbers and strings; `str()` is short."""

    @property
    def deterministic(self) -> bool:
        """Whether equal inputs give equal bits."""
        return True


class Layout(Protocol):
    """Where a vendor keeps each group's code."""

    def vendor(self, indices: Tensor) -> Tensor:
        """Our metadata, uint8 [O, I / 8], in the vendor's order: uint8 [O I / 8]."""

    def ours(self, metadata: Tensor, shape: tuple[int, int]) -> Tensor:
        """Undo `vendor`: uint8 [O I / 8] -> uint8 [O, I / 8] of a matrix of shape (O, I)."""


class VendorRoute(Protocol):
    """2:4 products by one vendor's library on one device."""

    name: str
    version: str
    standing: str
    """What is to be said beside the name wherever the route is shown; empty once it is proven on a card."""
    findings: dict[str, bool | None]
    """What long trials of the device have told, by their names; a dispatcher keeps it between processes, but for None:
    those did not come to an answer, and are not tried again in this run."""

    def unsupported(self, problem: Problem) -> str | None:
        """Why the route cannot compute a product, in words, or None if it can."""

    def metadata_layout(self, rows: int, columns: int, dtype: torch.dtype) -> Layout | None:
        """How the vendor orders the metadata of weights [rows, columns]; None: it takes none, give it `indices`."""

    def algorithms(self, problem: Problem) -> list[Any]:
        """The ways to compute a supported product, as `Algorithm`s; some may fail or be wrong: check each."""

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
        """X [T, I] -> Y [T, O] = X W^T (+ bias [O]) (+ addend [T, O]), row-major.

        Args:
            x: [T, I].
            values: [O, K].
            indices: uint8 [O, I / 8].
            metadata: uint8 [O I / 8] in the vendor's order, or None to derive it from `indices` now.
            algorithm: one that `algorithms` named.
            bias: added to every row.
            addend: added to the product; left as it is.

        Raises:
            VendorError: if the library refuses.
        """


def stream_of(device: torch.device) -> int:
    """The stream that work on a device is queued on now, as libraries take it; 0 where there are none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def on(device: torch.device) -> AbstractContextManager:
    """Make a device the current one, which libraries launch on."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)
