"""The autograd function of a sparse product.

Forward over W^R, input gradient over W^{R,C}, weight gradient as `values`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slope_dist.sparse import reference
from slope_dist.sparse.pattern import Pattern


class SparseProduct(torch.autograd.Function):
    """Y = X (W^R)^T with SLoPe's backward.

    The input gradient is deliberately not the derivative of the forward product: it uses the doubly pruned weight.
    The gradient of `values` is exact and has the shape of `values` (rule R1), so every optimizer, reducer and clipper
    sees an ordinary parameter.
    """

    @staticmethod
    def forward(
        x: Tensor,
        values: Tensor,
        indices: Tensor,
        column_mask: Tensor | None,
        transposed_values: Tensor | None,
        transposed_indices: Tensor | None,
        pattern: Pattern,
    ) -> Tensor:
        """X [T, I] -> Y [T, O]; see `sparse_product` for the others."""
        return reference.forward(x, values, indices, pattern)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        """Keep what backward needs: the input, and the compressed weight itself, never a dense one."""
        x, values, indices, column_mask, transposed_values, transposed_indices, pattern = inputs
        ctx.save_for_backward(x, values, indices, column_mask, transposed_values, transposed_indices)
        ctx.pattern = pattern

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """dY [T, O] -> (dX [T, I], d values [O, K])."""
        x, values, indices, column_mask, transposed_values, transposed_indices = ctx.saved_tensors
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            if transposed_values is not None:
                grad_x = reference.input_gradient_resident(grad_y, transposed_values, transposed_indices, ctx.pattern)
            else:
                grad_x = reference.input_gradient(grad_y, values, indices, ctx.pattern, column_mask)
        if ctx.needs_input_grad[1]:
            grad_values = reference.weight_gradient(grad_y, x, indices, ctx.pattern)
        return grad_x, grad_values, None, None, None, None, None


def sparse_product(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    pattern: Pattern,
    *,
    column_mask: Tensor | None = None,
    transpose: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Y = X (W^R)^T over any leading dimensions.

    Args:
        x: [..., I], the dtype of `values`.
        values: [O, K] kept entries.
        indices: uint8 [O, I / 8].
        pattern: their pattern.
        column_mask: packed uint8 [O, I / 8]: the second mask where it is held between steps; None means by magnitude
        now.
        transpose: a resident (W^{R,C})^T (values [I, O n / m], indices uint8 [I, O / 8]); None means derive it in
        backward.

    Returns:
        [..., O].
    """
    transposed_values, transposed_indices = transpose if transpose is not None else (None, None)
    flat = x.reshape(-1, x.shape[-1])
    y = SparseProduct.apply(flat, values, indices, column_mask, transposed_values, transposed_indices, pattern)
    return y.view(*x.shape[:-1], values.shape[0])
