"""Where a vendor's metadata keeps the two positions of each group.

For 16-bit values every vendor takes four bits a group, the positions of its two kept entries, the first in the low
bits: `indices` of slope_dist.sparse.codec in another order. So a layout is a permutation of nibbles, and metadata is
made from the mask, never from looking for zeros (rule R2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slope_dist.sparse.kernels.primitives import why_no_triton

_LONGEST_BLOCK = 512
"""Rows. Orders that do not repeat within it are kept whole."""


def permute_nibbles(packed: Tensor, source: Tensor) -> Tensor:
    """Reorder the nibbles of each block: nibble j of a block becomes the block's nibble `source[j]`.

    Args:
        packed: uint8 [N]; nibble 2 b is the low half of byte b.
        source: int32 [P], a block's worth of nibbles; P divides 2 N.

    Returns:
        uint8 [N].
    """
    nibbles = torch.stack([packed & 15, packed >> 4], dim=1).view(-1, source.numel())
    pairs = nibbles.index_select(1, source).view(-1, 2)
    return pairs[:, 0] | pairs[:, 1] << 4


@dataclass(frozen=True)
class MetadataLayout:
    """A vendor's order of metadata: int32 `source` [P], as `permute_nibbles` takes it.

    P is the whole matrix's O I / 4 nibbles, or those of the block of rows after which the order repeats: 32 bits a
    group for the whole matrix would outweigh the metadata itself eightfold.
    """

    source: Tensor

    @classmethod
    def of(cls, source: Tensor, rows: int) -> MetadataLayout:
        """The layout of a whole matrix's order, int32 [O I / 4], held as its shortest repeating block of rows."""
        for block in (2**power for power in range(_LONGEST_BLOCK.bit_length())):
            if rows % block or source.numel() * block // rows % 2:
                continue
            blocks = source.view(rows // block, -1)
            starts = torch.arange(len(blocks), dtype=source.dtype, device=source.device) * blocks.shape[1]
            if blocks.sub(starts.unsqueeze(1)).eq(blocks[0]).all():
                return cls(blocks[0].clone())
        return cls(source)

    def vendor(self, indices: Tensor) -> Tensor:
        """Our metadata, uint8 [O, I / 8], in the vendor's order: uint8 [O I / 8]."""
        return _permute(indices.reshape(-1), self.source)

    def ours(self, metadata: Tensor, shape: tuple[int, int]) -> Tensor:
        """Undo `vendor`: uint8 [O I / 8] -> uint8 [O, I / 8] of a matrix of shape (O, I)."""
        rows, columns = shape
        return _permute(metadata, self.source.argsort().int()).view(rows, columns // 8)


def _permute(packed: Tensor, source: Tensor) -> Tensor:
    if packed.is_cuda and why_no_triton("cuda") is None:
        from slope_dist.sparse.kernels.jit.permute import permute_nibbles as kernel

        return kernel(packed, source)
    return permute_nibbles(packed, source)
