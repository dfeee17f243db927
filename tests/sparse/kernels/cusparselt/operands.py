"""Operands of one product and what it comes to, in fp32, from the same rounded numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from slope_dist.sparse import Pattern, codec, pruning
from slope_dist.sparse.kernels import measuring
from slope_dist.sparse.kernels.metadata import MetadataLayout

TWO_FOUR = Pattern(2, 4)

MOST_TERMS = 1024
"""No product of these tests adds up more."""


class Operands:
    """x [T, I], values [O, K], indices uint8 [O, I / 8], bias [O] and addend [T, O], normal, of one dtype."""

    def __init__(self, tokens: int, rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.x = normal(tokens, columns)
        dense = normal(rows, columns)
        self.indices = codec.pack(pruning.row_mask(dense, TWO_FOUR), TWO_FOUR)
        self.values = codec.gather(dense, self.indices, TWO_FOUR)
        self.bias = normal(rows)
        self.addend = normal(tokens, rows)

    def in_place(self, layout: MetadataLayout) -> tuple[Tensor, Tensor]:
        """Values and metadata as neighbours in one buffer."""
        metadata = layout.vendor(self.indices)
        buffer = torch.empty(self.values.nbytes + metadata.nbytes, dtype=torch.uint8)
        values = buffer[: self.values.nbytes].view(self.values.dtype).view(self.values.shape)
        values.copy_(self.values)
        buffer[self.values.nbytes :].copy_(metadata)
        return values, buffer[self.values.nbytes :]

    def expected(self, *, bias: bool = False, addend: bool = False) -> Tensor:
        """The product in fp32."""
        y = self.x.float() @ codec.expand(self.values, self.indices, TWO_FOUR).float().t()
        if bias:
            y = y + self.bias.float()
        return y + self.addend.float() if addend else y


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether a product is within its dtype's bound of the fp32 one; NaN is not."""
    norm = torch.linalg.vector_norm
    return bool(norm(found.float() - expected) / norm(expected) <= measuring.bound(found.dtype, MOST_TERMS))
