"""What the sparse room must compute, written a second time: loops over Python numbers, no code of slope_dist.

Everything here takes and returns dense matrices. Ties go to the lower index; a mask decides, never a value.
Shape letters: T tokens, O out, I in, K kept entries of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

PATTERNS = ((1, 2), (2, 4), (2, 8), (4, 8))


def best(magnitudes: list[float], allowed: list[int], n: int) -> set[int]:
    """Positions among `allowed` of the n largest magnitudes (fewer if fewer are allowed)."""
    return set(sorted(allowed, key=lambda position: (-magnitudes[position], position))[:n])


def row_mask(dense: Tensor, n: int, m: int) -> Tensor:
    """[O, I] -> bool [O, I]: W^R keeps the n largest of every m along a row."""
    rows = [[abs(entry) for entry in row] for row in dense.tolist()]
    mask = torch.zeros(dense.shape, dtype=torch.bool)
    for r, row in enumerate(rows):
        for start in range(0, len(row), m):
            for position in best(row[start : start + m], list(range(m)), n):
                mask[r, start + position] = True
    return mask


def column_mask(dense: Tensor, kept: Tensor, n: int, m: int) -> Tensor:
    """[O, I] and the mask of W^R -> bool [O, I]: W^{R,C} keeps at most n of every m along a column."""
    magnitudes = [[abs(entry) for entry in column] for column in dense.t().tolist()]
    eligible = kept.t().tolist()
    mask = torch.zeros(dense.shape, dtype=torch.bool)
    for c, column in enumerate(magnitudes):
        for start in range(0, len(column), m):
            allowed = [position for position in range(m) if eligible[c][start + position]]
            for position in best(column[start : start + m], allowed, n):
                mask[start + position, c] = True
    return mask


def slots_of_transpose(doubly_kept: Tensor, n: int, m: int) -> Tensor:
    """Mask of W^{R,C} [O, I] -> bool [I, O], exactly n in every m: free slots take the lowest free positions."""
    slots = doubly_kept.t().clone()
    for r in range(slots.shape[0]):
        for start in range(0, slots.shape[1], m):
            missing = n - int(slots[r, start : start + m].sum())
            for position in range(start, start + m):
                if missing and not slots[r, position]:
                    slots[r, position] = True
                    missing -= 1
    return slots


def pack(mask: Tensor, n: int, m: int) -> list[list[int]]:
    """The bytes of a mask by the format's description: 2:4 as two 2-bit positions a group, others as a bit map."""
    packed = []
    for row in mask.tolist():
        numbers = []
        for start in range(0, len(row), 8):
            if (n, m) == (2, 4):
                low = [position for position in range(4) if row[start + position]]
                high = [position for position in range(4) if row[start + 4 + position]]
                numbers.append(low[0] + 4 * low[1] + 16 * high[0] + 64 * high[1])
            else:
                numbers.append(sum(2**bit for bit in range(8) if row[start + bit]))
        packed.append(numbers)
    return packed


def kept_entries(dense: Tensor, mask: Tensor) -> Tensor:
    """[O, I] -> [O, K], row-major."""
    return torch.stack([row[kept] for row, kept in zip(dense, mask, strict=True)])


def products(x: Tensor, dense: Tensor, kept: Tensor, doubly_kept: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
    """Y, dX and the gradient of the kept entries, in the precision of the arguments: X [T, I], dY [T, O]."""
    zero = torch.zeros((), dtype=dense.dtype)
    w_r, w_rc = torch.where(kept, dense, zero), torch.where(doubly_kept, dense, zero)
    return x @ w_r.t(), grad_y @ w_rc, kept_entries(grad_y.t() @ x, kept)


def gradient(leaf: Tensor) -> Tensor:
    """The gradient of a leaf that must have one."""
    assert leaf.grad is not None
    return leaf.grad


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal shape, dtype and bytes: tells 0 from -0.0 and takes NaN as equal to itself."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return left.reshape(-1).contiguous().view(torch.uint8).equal(right.reshape(-1).contiguous().view(torch.uint8))


def difficult_matrix(kind: str, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[rows, columns] of a kind that pruning can get wrong: "random", "ties", "equal", "zeros", "signed zeros"."""
    if kind == "random":
        return torch.randn(rows, columns).to(dtype)
    if kind == "ties":
        return torch.randint(-2, 3, (rows, columns)).to(dtype)
    if kind == "equal":
        return torch.full((rows, columns), -0.75, dtype=dtype)
    signs = torch.where(torch.rand(rows, columns) < 0.5, -1.0, 1.0)
    if kind == "zeros":
        return (signs * 0.0).to(dtype)
    assert kind == "signed zeros"
    return (signs * torch.randn(rows, columns) * (torch.rand(rows, columns) < 0.4)).to(dtype)


KINDS = ("random", "ties", "equal", "zeros", "signed zeros")
