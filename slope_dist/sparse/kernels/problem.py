"""What a product is asked for: its shape, dtype and device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

Kind: TypeAlias = Literal["product", "input gradient"]


@dataclass(frozen=True)
class Problem:
    """Y [T, O] = X [T, I] W^T over a compressed weight: T tokens, O rows, I columns of W."""

    tokens: int
    rows: int
    columns: int
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.rows} x {self.columns}, {self.tokens} tokens, {dtype}"

    def transposed(self) -> Problem:
        """The product over the transpose: of an output's gradient, giving that of the input."""
        return Problem(self.tokens, self.columns, self.rows, self.dtype, self.device)
