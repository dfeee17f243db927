"""Magnitude pruning along rows and columns, and the two together (arXiv 2405.16325 section 4.3).

Everywhere: larger magnitude first, ties to the lower index. The mask decides what is kept, never the value: a kept
entry may be 0 or -0.0, and an entry that was pruned before can not come back however small its competitors are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slope_dist.sparse import codec
from slope_dist.sparse.pattern import Pattern


def _top(scores: list[Tensor], keep: int) -> list[Tensor]:
    """For m competing score tensors of one shape, which are among the `keep` best at each place (ties to the first)."""
    wins = [torch.zeros_like(scores[0], dtype=torch.uint8) for _ in scores]
    for i in range(len(scores)):
        for j in range(i + 1, len(scores)):
            first_wins = scores[i] >= scores[j]
            wins[i] += first_wins
            wins[j] += ~first_wins
    return [count >= len(scores) - keep for count in wins]


def row_mask(dense: Tensor, pattern: Pattern) -> Tensor:
    """Keep the n largest magnitudes of every m consecutive entries of a row: [O, I] -> bool [O, I]."""
    return _row_top(dense.abs(), pattern)


def _row_top(scores: Tensor, pattern: Pattern) -> Tensor:
    rows, columns = scores.shape
    groups = scores.view(rows, columns // pattern.m, pattern.m)
    return torch.stack(_top(list(groups.unbind(2)), pattern.n), dim=2).view(rows, columns)


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
    rows, columns = indices.shape[0], indices.shape[1] * 8
    if rows % pattern.m:
        raise ValueError(f"{rows} rows are not a whole number of groups of {pattern.m}")
    # Pruned entries score below every magnitude, so they never displace a kept zero.
    scores = values.new_full((rows, columns), -1.0)
    scores.scatter_(1, codec.columns_of(indices, pattern), values.abs())
    scores = scores.view(rows // pattern.m, pattern.m, columns)
    best = torch.stack(_top(list(scores.unbind(1)), pattern.n), dim=1)
    return (best & (scores >= 0)).view(rows, columns)


def doubly_pruned(values: Tensor, indices: Tensor, pattern: Pattern, kept: Tensor | None = None) -> Tensor:
    """W^{R,C} as a dense matrix [O, I]; `kept` (bool [O, I]) replaces the mask by magnitude where one is held fixed."""
    mask = column_mask(values, indices, pattern) if kept is None else kept
    dense = codec.expand(values, indices, pattern)
    # where, not a product: 0 * inf would be NaN.
    return torch.where(mask, dense, dense.new_zeros(()))


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
    transposed = doubly_pruned(values, indices, pattern, mask).t().contiguous()
    slots = _row_top(mask.t().contiguous().to(torch.uint8), pattern)
    packed = codec.pack(slots, pattern)
    return codec.gather(transposed, packed, pattern), packed
