"""Magnitude pruning along rows and columns, and the two together (arXiv 2405.16325 section 4.3).

Everywhere: larger magnitude first, ties to the lower index. The mask decides what is kept, never the value: a kept
entry may be 0 or -0.0, and an entry that was pruned before can not come back however small its competitors are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slope_dist.sparse import codec
from slope_dist.sparse.pattern import Pattern


def scores(entries: Tensor) -> Tensor:
    """Integers of the width of the entries that order them by magnitude, from 1 up: 0 is left for what was pruned.

    The bits of a magnitude, read as a number, order it; NaN counts as larger than infinity. The comparisons of `_best`
    are then additions and shifts, which vectorise in every precision.
    """
    bits = codec.as_integers(entries.abs())
    return bits.clamp_(max=torch.iinfo(bits.dtype).max - 1).add_(1)


def _best(scores: Sequence[Tensor], n: int) -> list[Tensor]:
    """Which of m competing score tensors (integers from 0 up, of one shape) are among the n best at each place.

    Returns:
        for each, integers of its dtype with all bits set where it is (ties to the first), else 0.
    """
    sign = 8 * scores[0].element_size() - 1
    # How many may still come before each; those ahead in order do, unless found smaller.
    spare = [torch.full_like(score, n - 1 - i) for i, score in enumerate(scores)]
    for i, first in enumerate(scores):
        for j in range(i + 1, len(scores)):
            smaller = (first - scores[j]).bitwise_right_shift_(sign)
            spare[i] += smaller
            spare[j] -= smaller
    return [count.bitwise_right_shift_(sign).bitwise_not_() for count in spare]


def row_mask(dense: Tensor, pattern: Pattern) -> Tensor:
    """Keep the n largest magnitudes of every m consecutive entries of a row: [O, I] -> bool [O, I]."""
    rows, columns = dense.shape
    groups = scores(dense).view(rows, columns // pattern.m, pattern.m)
    return torch.stack(_best(groups.unbind(2), pattern.n), dim=2).view(rows, columns).bool()


def _rows_of_tiles(matrix: Tensor, pattern: Pattern) -> tuple[Tensor, ...]:
    """Every m-th row of [O, I], m times: the competitors of each column's groups, m views [O / m, I].

    Raises:
        ValueError: if O is no multiple of m.
    """
    rows, columns = matrix.shape
    if rows % pattern.m:
        raise ValueError(f"{rows} rows are not a whole number of groups of {pattern.m}")
    return matrix.view(rows // pattern.m, pattern.m, columns).unbind(1)


def column_mask(values: Tensor, indices: Tensor, pattern: Pattern) -> Tensor:
    """Second pruning: of the kept entries, keep at most n of every m consecutive ones in a column.

    Args:
        values: [O, K] kept entries of W^R. O must be a multiple of m.
        indices: uint8 [O, I / 8], their metadata.
        pattern: the pattern, the same in both directions.

    Returns:
        bool [O, I], True where W^{R,C} keeps an entry of W^R. Groups of a column with fewer than n kept entries keep
        all they have.
    """
    expanded = codec.expand(scores(values), indices, pattern)
    best = _best(_rows_of_tiles(expanded, pattern), pattern.n)
    return (torch.stack(best, dim=1).view(expanded.shape) & expanded) != 0


def doubly_pruned(values: Tensor, indices: Tensor, pattern: Pattern, kept: Tensor | None = None) -> Tensor:
    """W^{R,C} as a dense matrix [O, I]; `kept` (bool [O, I]) replaces the mask by magnitude where one is held fixed."""
    # On the bits, not the numbers: 0 * inf would be NaN.
    if kept is None:
        masks = _best(_rows_of_tiles(codec.expand(scores(values), indices, pattern), pattern), pattern.n)
        dense = codec.expand(values, indices, pattern)
        for row, mask in zip(_rows_of_tiles(codec.as_integers(dense), pattern), masks, strict=True):
            row &= mask
    else:
        dense = codec.expand(values, indices, pattern)
        codec.as_integers(dense).mul_(kept)
    return dense


def doubly_pruned_transpose(
    values: Tensor, indices: Tensor, pattern: Pattern, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(W^{R,C})^T in the same compressed format as W^R, so that the input gradient is a product of the same kind.

    31 % of the columns' 2:4 groups keep fewer than two entries. Their free slots are explicit: they take the lowest
    free positions and hold zero.

    Returns:
        values [I, O * n / m] and indices uint8 [I, O / 8].
    """
    mask = column_mask(values, indices, pattern) if kept is None else kept
    dense = doubly_pruned(values, indices, pattern, mask)
    # What is kept scores 1 and comes first; at most n of a group are, so they and the lowest others take its n slots.
    slots = torch.stack(_best(_rows_of_tiles(codec.as_integers(mask), pattern), pattern.n), dim=1).bitwise_and_(1)
    packed = codec.encode(slots.view(torch.bool).view(mask.shape).t(), pattern)
    return codec.gather(dense.t().contiguous(), packed, pattern), packed
