"""The autograd functions of a sparse product: by the reference, and by what a dispatcher chose.

Forward over W^R, input gradient over W^{R,C}, weight gradient as `values`.
"""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class KernelForm:
    """What a dispatcher's products read of a weight beside its values and indices.

    Attributes:
        form, metadata: a vendor's metadata of W^R, or "" and None.
        transpose: a resident (W^{R,C})^T with the metadata of its own.
    """

    form: str = ""
    metadata: Tensor | None = None
    transpose: TransposeForm | None = None


@dataclass(frozen=True)
class TransposeForm:
    """(W^{R,C})^T: values [I, O / 2], indices uint8 [I, O / 8], and a vendor's metadata of it or "" and None."""

    values: Tensor
    indices: Tensor
    form: str = ""
    metadata: Tensor | None = None


class KernelProduct(torch.autograd.Function):
    """Y = X (W^R)^T + bias + addend with SLoPe's backward, computed by the operators of the dispatcher in use.

    The bias is added in the product's epilogue, and the addend (an adapter's output) is what it accumulates onto.
    """

    @staticmethod
    def forward(
        x: Tensor,
        values: Tensor,
        indices: Tensor,
        column_mask: Tensor | None,
        bias: Tensor | None,
        addend: Tensor | None,
        form: str,
        metadata: Tensor | None,
        transposed_values: Tensor | None,
        transposed_indices: Tensor | None,
        transposed_form: str,
        transposed_metadata: Tensor | None,
    ) -> Tensor:
        """X [T, I] -> Y [T, O]."""
        return torch.ops.slope_dist.product(x, values, indices, form, metadata, bias, addend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        """Keep the input and the compressed weight."""
        x, values, indices, column_mask, _, _, _, _, *transpose = inputs
        transposed_values, transposed_indices, ctx.transposed_form, transposed_metadata = transpose
        ctx.save_for_backward(
            x, values, indices, column_mask, transposed_values, transposed_indices, transposed_metadata
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """dY [T, O] -> dX [T, I], d values [O, K], d bias [O], d addend [T, O]."""
        x, values, indices, column_mask, transposed_values, transposed_indices, transposed_metadata = ctx.saved_tensors
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            if transposed_values is not None:
                grad_x = torch.ops.slope_dist.product(
                    grad_y, transposed_values, transposed_indices, ctx.transposed_form, transposed_metadata, None, None
                )
            else:
                grad_x = torch.ops.slope_dist.input_gradient(grad_y, values, indices, column_mask)
        if ctx.needs_input_grad[1]:
            grad_values = torch.ops.slope_dist.weight_gradient(grad_y, x, indices)
        grad_bias = grad_y.sum(0) if ctx.needs_input_grad[4] else None
        grad_addend = grad_y if ctx.needs_input_grad[5] else None
        return grad_x, grad_values, None, None, grad_bias, grad_addend, *[None] * 6


def kernel_product(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    kernel_form: KernelForm,
    *,
    column_mask: Tensor | None = None,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """Y = X (W^R)^T (+ addend) (+ bias) over any leading dimensions, for 2:4 weights alone.

    Args:
        x: [..., I], the dtype of `values`.
        values: [O, K] kept entries.
        indices: uint8 [O, I / 8].
        kernel_form: what else the kernels read.
        column_mask: packed uint8 [O, I / 8], where the second mask is held.
        bias: [O].
        addend: [..., O].

    Returns:
        [..., O].
    """
    transpose = kernel_form.transpose
    flat = x.reshape(-1, x.shape[-1])
    y = KernelProduct.apply(
        flat,
        values,
        indices,
        column_mask,
        bias,
        None if addend is None else addend.reshape(-1, addend.shape[-1]),
        kernel_form.form,
        kernel_form.metadata,
        None if transpose is None else transpose.values,
        None if transpose is None else transpose.indices,
        "" if transpose is None else transpose.form,
        None if transpose is None else transpose.metadata,
    )
    return y.view(*x.shape[:-1], values.shape[0])
