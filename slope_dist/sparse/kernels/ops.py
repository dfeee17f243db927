"""The products as operators of torch, each with a shape function, so that compilers and CUDA graphs take them whole.

Inside, the dispatcher in use decides; a graph that was compiled with one runs with whichever is in use then. Their
gradients are those of `slope_dist.sparse.function`, not of the operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slope_dist.sparse.kernels import primitives
from slope_dist.sparse.kernels.active import active
from slope_dist.sparse.kernels.candidates import Operands
from slope_dist.sparse.kernels.dispatch import Dispatcher

_SCHEMAS = (
    "product(Tensor x, Tensor values, Tensor indices, str form, Tensor? metadata, Tensor? bias, Tensor? addend) "
    "-> Tensor",
    "product_with_adapter(Tensor x, Tensor values, Tensor indices, str form, Tensor? metadata, Tensor? bias, "
    "Tensor down, Tensor up, float scale) -> Tensor",
    "input_gradient(Tensor grad_y, Tensor values, Tensor indices, Tensor? column_mask) -> Tensor",
    "weight_gradient(Tensor grad_y, Tensor x, Tensor indices) -> Tensor",
    "transpose(Tensor values, Tensor indices, Tensor? column_mask) -> (Tensor, Tensor)",
)

LARGEST_GRADIENT = 2**27
"""Entries of a dense weight gradient that exist at one time: larger ones are made and gathered in blocks of rows."""

_TILE = 256
"""Rows of the largest tiles that dense products are computed in: of blocks of whole tiles none is half empty."""


def _dispatcher() -> Dispatcher:
    dispatcher = active()
    if dispatcher is None:
        raise RuntimeError("no dispatcher of 2:4 products is in use; see slope_dist.sparse.kernels.activate")
    return dispatcher


def product(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    form: str = "",
    metadata: Tensor | None = None,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """Y [T, O] = X [T, I] W^T (+ bias [O]) (+ addend [T, O]) over values [O, K] and indices uint8 [O, I / 8]."""
    return _dispatcher().product(Operands(x.contiguous(), values, indices, form, metadata, bias, addend))


def product_with_adapter(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    form: str,
    metadata: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
) -> Tensor:
    """Y = X W^T + (scale X down^T) up^T (+ bias): down [R, I], up [O, R]."""
    operands = Operands(x.contiguous(), values, indices, form, metadata, bias)
    return _dispatcher().product_with_adapter(operands, down, up, scale)


def input_gradient(grad_y: Tensor, values: Tensor, indices: Tensor, column_mask: Tensor | None = None) -> Tensor:
    """dX [T, I] = dY [T, O] W^{R,C}, from W^R and the packed column mask uint8 [O, I / 8], or magnitudes of now."""
    return _dispatcher().input_gradient(Operands(grad_y.contiguous(), values, indices, column_mask=column_mask))


def weight_gradient(grad_y: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Gradient of `values` [O, K] = the kept entries of dY^T X: dY [T, O], X [T, I], indices uint8 [O, I / 8].

    The product is dense, for the sparsity is in its result (eq. BWD-1).
    """
    rows, columns = grad_y.shape[1], x.shape[1]
    height = gradient_rows(rows, columns)
    if height == rows:
        return primitives.gather(grad_y.t() @ x, indices)
    gradient = x.new_empty(rows, columns // 2)
    for start in range(0, rows, height):
        part = slice(start, start + height)
        primitives.gather(grad_y[:, part].t() @ x, indices[part], gradient[part])
    return gradient


def gradient_rows(rows: int, columns: int) -> int:
    """Rows of a dense weight gradient [O, I] that exist at one time.

    In equal blocks: a last one of a few rows would leave most of a card idle for as long as it takes.
    """
    parts = -(-rows * columns // LARGEST_GRADIENT)
    return min(rows, -(-rows // (parts * _TILE)) * _TILE)


def transpose(values: Tensor, indices: Tensor, column_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(W^{R,C})^T compressed: values [I, O / 2], indices uint8 [I, O / 8]."""
    return primitives.transpose(values, indices, column_mask)


def _product_shape(x: Tensor, values: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0])


def _input_gradient_shape(grad_y: Tensor, values: Tensor, indices: Tensor, column_mask: Tensor | None) -> Tensor:
    return grad_y.new_empty(grad_y.shape[0], indices.shape[1] * 8)


def _weight_gradient_shape(grad_y: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    return x.new_empty(indices.shape[0], indices.shape[1] * 4)


def _transpose_shape(values: Tensor, indices: Tensor, column_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, columns = indices.shape[0], indices.shape[1] * 8
    return values.new_empty(columns, rows // 2), indices.new_empty(columns, rows // 8)


# Defined without torch's decorator, whose checks of aliases take longer than a small product.
_library = torch.library.Library("slope_dist", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema)
for _name, _function, _shape in (
    ("product", product, _product_shape),
    ("product_with_adapter", product_with_adapter, _product_shape),
    ("input_gradient", input_gradient, _input_gradient_shape),
    ("weight_gradient", weight_gradient, _weight_gradient_shape),
    ("transpose", transpose, _transpose_shape),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"slope_dist::{_name}", _shape, lib=_library)
