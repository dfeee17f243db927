"""The order in which CUTLASS keeps metadata: ours by words of four groups, their axes exchanged.

In both orders the four codes of 16 consecutive columns stay together, in order, as one 16-bit word. So a change of
order is one strided copy, and no map of it is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WORD_COLUMNS = 16
"""Columns of W whose codes make one word."""


@dataclass(frozen=True)
class WordLayout:
    """How the words of a weight lie: those of our order, seen as `axes`, taken in the order of the axes `taken`."""

    axes: tuple[int, ...]
    taken: tuple[int, ...]

    def vendor(self, indices: Tensor) -> Tensor:
        """Our metadata, uint8 [O, I / 8], in CUTLASS's order: uint8 [O I / 8]."""
        return self._exchange(indices, self.axes, self.taken).view(torch.uint8)

    def ours(self, metadata: Tensor, shape: tuple[int, int]) -> Tensor:
        """Undo `vendor`: uint8 [O I / 8] -> uint8 [O, I / 8] of a matrix of shape (O, I)."""
        taken = tuple(self.axes[axis] for axis in self.taken)
        back = tuple(self.taken.index(axis) for axis in range(len(self.axes)))
        return self._exchange(metadata, taken, back).view(torch.uint8).view(shape[0], shape[1] // 8)

    @staticmethod
    def _exchange(packed: Tensor, axes: tuple[int, ...], taken: tuple[int, ...]) -> Tensor:
        packed = packed.detach().reshape(-1)
        if packed.storage_offset() % 2:
            packed = packed.clone()
        return packed.view(torch.int16).view(axes).permute(taken).reshape(-1)


def sm80(rows: int, columns: int) -> WordLayout:
    """Ampere's order, for O a multiple of 32 and I of 32.

    With a row as (block of 32, a, b, row of 8), a and b single bits, and a word of it as (pair, c): pairs come first,
    as in a matrix stored by columns of two; within, the row of 8 before a, and b exchanged with c, which is how four
    matrices of 8 x 8 are read from shared memory at once.
    """
    return WordLayout((rows // 32, 2, 2, 8, columns // 32, 2), (4, 0, 3, 1, 5, 2))


def sm90(rows: int, columns: int) -> WordLayout:
    """Hopper's order for tiles 64 deep, for O a multiple of 64 and I of 64.

    Blocks of 64 x 64, by columns of blocks. With a row of one as (warp of 16 rows, half, row of 8) and a word as
    (instruction, c): warp, c, row of 8, instruction, half. That puts side by side what a thread reads at once.
    """
    return WordLayout((rows // 64, 4, 2, 8, columns // 64, 2, 2), (4, 0, 1, 6, 3, 5, 2))
