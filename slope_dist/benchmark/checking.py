"""Products of a 2:4 weight beside dense masked ones in fp32: what is wrong is not timed.

Shape letters: T tokens, O out, I in, K kept entries a row.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from slope_dist.benchmark.timing import WrongResultError
from slope_dist.layers import Linear
from slope_dist.sparse import SparseWeight, codec
from slope_dist.sparse.kernels.measuring import BOUNDS


def largest_two(scores: Tensor) -> Tensor:
    """True at the two largest of every four in a row, ties to the lower index: fp32 [R, C] -> bool [R, C]."""
    order = scores.view(-1, 4).argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :2], True).view_as(scores)


def doubly_kept(magnitudes: Tensor, kept: Tensor) -> Tensor:
    """What the second mask keeps of the first, made anew by sorting: fp32 [O, I], bool [O, I] -> bool [O, I]."""
    # -1: below every magnitude, so what is pruned never displaces a kept zero.
    return largest_two(torch.where(kept, magnitudes, -1.0).t().contiguous()).t() & kept


def relative_error(found: Tensor | None, expected: Tensor) -> float:
    """Norm of the difference over that of what is expected."""
    assert found is not None
    difference = torch.linalg.vector_norm(found.detach().float() - expected)
    return float(difference / torch.linalg.vector_norm(expected))


def require_right(what: str, name: str, found: Tensor | None, expected: Tensor, dtype: torch.dtype) -> float:
    """The error of a result.

    Raises:
        WrongResultError: it is above the bound of the dtype.
    """
    error = relative_error(found, expected)
    # Not `error > bound`: NaN must not pass.
    if not error <= BOUNDS[dtype]:
        raise WrongResultError(f"{what}: {name} is off the dense masked product by {error:.1e}")
    return error


@torch.no_grad()
def check_linear(layer: Linear, tokens: int, what: str) -> None:
    """Check what a layer with a 2:4 weight gives, its adapter and bias included, as in inference.

    Raises:
        WrongResultError: it is wrong.
    """
    weight = layer.weight
    assert isinstance(weight, SparseWeight)
    dtype = weight.values.dtype
    x = torch.randn(tokens, weight.shape[1], device=weight.values.device).to(dtype)
    expected = x.float() @ codec.expand(weight.values, weight.indices, weight.pattern).float().t()
    if layer.adapter is not None:
        down, up = layer.adapter.down.float(), layer.adapter.up.float()
        expected += x.float() @ down.t() * layer.adapter.scale @ up.t()
    if layer.bias is not None:
        expected += layer.bias.float()
    require_right(what, "output", layer(x), expected, dtype)


def one_of_each_shape(weights: Iterable[SparseWeight]) -> list[SparseWeight]:
    """The first weight of every shape."""
    found: dict[tuple[int, int], SparseWeight] = {}
    for weight in weights:
        found.setdefault(weight.shape, weight)
    return list(found.values())


def check_weight(weight: SparseWeight, tokens: int, what: str) -> None:
    """Check the products of a weight where it lies, with as many tokens as it is about to be timed with.

    Raises:
        WrongResultError: the output or a gradient is wrong.
    """
    dtype, device = weight.values.dtype, weight.values.device
    kept = codec.mask_of(weight.indices, weight.pattern)
    dense = codec.expand(weight.values.detach(), weight.indices, weight.pattern).float()
    x = torch.randn(tokens, weight.shape[1], device=device).to(dtype).requires_grad_()
    y = weight(x)
    require_right(what, "output", y, x.detach().float() @ dense.t(), dtype)
    grad_y = torch.randn(tokens, weight.shape[0], device=device).to(dtype)
    before, weight.values.grad = weight.values.grad, None
    y.backward(grad_y)
    grad_values, weight.values.grad = weight.values.grad, before
    expected = grad_y.float().t() @ x.detach().float()
    require_right(what, "weight_gradient", grad_values, expected[kept].view_as(weight.values), dtype)
    del expected
    if weight.column_mask is None:
        kept = doubly_kept(dense.abs(), kept)
    else:
        kept = kept & codec.unpack_bits(weight.column_mask)
    require_right(what, "input_gradient", x.grad, grad_y.float() @ (dense * kept), dtype)
