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
from slope_dist.sparse.kernels import measuring


def largest_two(scores: Tensor) -> Tensor:
    """True at the two largest of every four in a row, ties to the lower index: fp32 [R, C] -> bool [R, C]."""
    order = scores.view(-1, 4).argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :2], True).view_as(scores)


def doubly_kept(magnitudes: Tensor, kept: Tensor) -> Tensor:
    """What the second mask keeps of the first, made anew by sorting: fp32 [O, I], bool [O, I] -> bool [O, I]."""
    # -1: below every magnitude, so what is pruned never displaces a kept zero.
    return largest_two(torch.where(kept, magnitudes, -1.0).t().contiguous()).t() & kept


def require_right(
    what: str,
    name: str,
    found: Tensor | None,
    product: Tensor,
    terms: int,
    *,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
) -> float:
    """The error of a result, relative by norm. Arguments as of `measuring.off_by`.

    Raises:
        WrongResultError: it is above what the result's dtype allows, anywhere.
    """
    assert found is not None
    found = found.detach()
    off = measuring.off_by(found, product, terms, bias=bias, addend=addend)
    if off is not None:
        raise WrongResultError(f"{what}: {name} is off the dense masked product {off}")
    expected = product
    for term in (addend, bias):
        expected = expected if term is None else expected + term.float()
    return float(torch.linalg.vector_norm(found.float() - expected) / torch.linalg.vector_norm(expected))


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
    product = x.float() @ codec.expand(weight.values, weight.indices, weight.pattern).float().t()
    addend = None
    if layer.adapter is not None:
        down, up = layer.adapter.down.float(), layer.adapter.up.float()
        addend = x.float() @ down.t() * layer.adapter.scale @ up.t()
    require_right(what, "output", layer(x), product, weight.shape[1], bias=layer.bias, addend=addend)


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
    require_right(what, "output", y, x.detach().float() @ dense.t(), weight.shape[1])
    grad_y = torch.randn(tokens, weight.shape[0], device=device).to(dtype)
    before, weight.values.grad = weight.values.grad, None
    y.backward(grad_y)
    grad_values, weight.values.grad = weight.values.grad, before
    expected = grad_y.float().t() @ x.detach().float()
    require_right(what, "weight_gradient", grad_values, expected[kept].view_as(weight.values), tokens)
    del expected
    if weight.column_mask is None:
        kept = doubly_kept(dense.abs(), kept)
    else:
        kept = kept & codec.unpack_bits(weight.column_mask)
    require_right(what, "input_gradient", x.grad, grad_y.float() @ (dense * kept), weight.shape[0])
