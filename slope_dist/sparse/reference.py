"""The three products of a sparse linear layer in plain torch: the definition, the CPU path and the oracle (rule R5).

    forward          Y  = X (W^R)^T            arXiv 2405.16325, eq. FWD
    input gradient   dX = dY W^{R,C}           eq. BWD-2; W^{R,C} is W^R pruned again along its columns
    weight gradient  dV = gather(dY^T X)       eq. BWD-1 on the kept entries, in the shape of `values`

The dense matrices built here live for one product.
"""

from __future__ import annotations

from torch import Tensor

from slope_dist.sparse import codec, pruning
from slope_dist.sparse.pattern import Pattern


def forward(x: Tensor, values: Tensor, indices: Tensor, pattern: Pattern) -> Tensor:
    """X [T, I], values [O, K], indices uint8 [O, I / 8] -> Y [T, O]."""
    return x @ codec.expand(values, indices, pattern).t()


def input_gradient(
    grad_y: Tensor, values: Tensor, indices: Tensor, pattern: Pattern, column_mask: Tensor | None = None
) -> Tensor:
    """dY [T, O] -> dX [T, I] over W^{R,C}, derived here from the values.

    `column_mask`, packed uint8 [O, I / 8], replaces the mask by current magnitude where one is held between steps.
    """
    kept = None if column_mask is None else codec.unpack_bits(column_mask)
    return grad_y @ pruning.doubly_pruned(values, indices, pattern, kept)


def input_gradient_resident(
    grad_y: Tensor, transposed_values: Tensor, transposed_indices: Tensor, pattern: Pattern
) -> Tensor:
    """dY [T, O] -> dX [T, I] from a compressed (W^{R,C})^T: the forward product over the transposed weight."""
    return forward(grad_y, transposed_values, transposed_indices, pattern)


def weight_gradient(grad_y: Tensor, x: Tensor, indices: Tensor, pattern: Pattern) -> Tensor:
    """dY [T, O], X [T, I] -> gradient of `values`, [O, K]."""
    return codec.gather(grad_y.t() @ x, indices, pattern)
