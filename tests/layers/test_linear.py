"""A linear is product + adapter + bias with all gradients right, and compiles without a graph break.

Run: pytest tests/layers/test_linear.py
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from slope_dist.layers import Linear, LowRankAdapter
from slope_dist.sparse import CompressedMatrix, DenseWeight, Pattern, SparseWeight, codec
from tests.sparse import oracle
from tests.sparse.oracle import gradient

OUT, IN, RANK = 24, 40, 16

OPTIONS: dict[str, dict[str, Any]] = {
    "derived": {},
    "held mask": {"hold_column_mask": True},
    "resident": {"resident_transpose": True},
    "frozen metadata": {"hold_column_mask": True, "metadata_as_parameter": True},
}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make_linear(
    *,
    pattern: Pattern | None,
    bias: bool = True,
    adapter: bool = True,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Linear:
    dense = torch.randn(OUT, IN)
    weight = DenseWeight(dense) if pattern is None else SparseWeight(CompressedMatrix.prune(dense, pattern), **options)
    factors = LowRankAdapter(torch.randn(RANK, IN), OUT, split="column") if adapter else None
    linear = Linear("layer", weight, bias=bias, split="column", adapter=factors)
    with torch.no_grad():
        if linear.adapter is not None:
            linear.adapter.up.normal_()
        if linear.bias is not None:
            linear.bias.normal_()
    return linear.to(dtype)


def sparse_weight(linear: Linear) -> SparseWeight:
    assert isinstance(linear.weight, SparseWeight)
    return linear.weight


def output_and_gradients(linear: Linear, layer, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    """Through `layer` (the linear itself or a compiled form of it) forward and backward."""
    linear.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad_y)
    gradients = {name: gradient(p).clone() for name, p in linear.named_parameters() if p.requires_grad}
    return {"output": y.detach(), "input": gradient(x), **gradients}


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "adapter"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "2:4"])
def test_output_and_every_gradient_equal_the_written_out_formula(sparse: bool, bias: bool, adapter: bool) -> None:
    linear = make_linear(pattern=Pattern(2, 4) if sparse else None, bias=bias, adapter=adapter, dtype=torch.float64)
    x, grad_y = torch.randn(7, IN, dtype=torch.float64), torch.randn(7, OUT, dtype=torch.float64)
    if isinstance(linear.weight, SparseWeight):
        dense = linear.weight.matrix().expand()
        kept = codec.mask_of(linear.weight.indices, Pattern(2, 4))
        doubly_kept = oracle.column_mask(dense, kept, 2, 4)
    else:
        dense = linear.weight.values.detach()
        kept = doubly_kept = torch.ones(OUT, IN, dtype=torch.bool)
    y, grad_x, grad_values = oracle.products(x, dense, kept, doubly_kept, grad_y)
    expected = {"output": y, "input": grad_x, "weight.values": grad_values.view_as(linear.weight.values)}
    if linear.adapter is not None:
        down, up = linear.adapter.down.detach(), linear.adapter.up.detach()
        expected["output"] = expected["output"] + x @ down.t() @ up.t() / RANK
        expected["input"] = expected["input"] + grad_y @ up @ down / RANK
        expected["adapter.down"] = (grad_y @ up).t() @ x / RANK
        expected["adapter.up"] = grad_y.t() @ (x @ down.t()) / RANK
    if linear.bias is not None:
        expected["output"] = expected["output"] + linear.bias.detach()
        expected["bias"] = grad_y.sum(0)
    torch.testing.assert_close(output_and_gradients(linear, linear, x, grad_y), expected, rtol=1e-12, atol=1e-12)


def test_a_new_adapter_scales_by_one_over_rank_and_starts_at_zero() -> None:
    adapter = LowRankAdapter(torch.randn(RANK, IN), OUT, split="column")
    assert adapter.scale == 1 / RANK
    assert adapter.up.shape == (OUT, RANK) and not adapter.up.any()
    assert not adapter(torch.randn(5, IN)).any()


def test_fp16_adapter_does_not_overflow_between_its_factors() -> None:
    down = torch.full((RANK, IN), 100.0)
    adapter = LowRankAdapter(down, OUT, split="column").half()
    with torch.no_grad():
        adapter.up.fill_(1.0)
    # Each entry of X down^T is 40 * 100 * 8 = 32000; the sum of 16 of them would pass 65504, their mean does not.
    y = adapter(torch.full((3, IN), 8.0, dtype=torch.float16))
    torch.testing.assert_close(y, torch.full((3, OUT), 32000.0, dtype=torch.float16))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_without_a_graph_break_it_gives_the_same_numbers(backend: str, name: str) -> None:
    linear = make_linear(pattern=Pattern(2, 4), **OPTIONS[name])
    compiled = torch.compile(linear, fullgraph=True, backend=backend)
    for step in range(3):
        x, grad_y = torch.randn(5, IN), torch.randn(5, OUT)
        expected = output_and_gradients(linear, linear, x, grad_y)
        if step:
            # As after an optimizer step: the compiled linear may meet a stale cache.
            sparse_weight(linear).values_changed()
        actual = output_and_gradients(linear, compiled, x, grad_y)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
        with torch.no_grad():
            linear.weight.values.mul_(torch.rand_like(linear.weight.values))
        sparse_weight(linear).values_changed()


@pytest.mark.usefixtures("fresh_compiler")
def test_one_compiled_linear_serves_several_token_counts() -> None:
    linear = make_linear(pattern=Pattern(2, 4))
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for leading in ((63,), (1,), (2, 5), (3,)):
        x, grad_y = torch.randn(*leading, IN), torch.randn(*leading, OUT)
        expected = output_and_gradients(linear, linear, x, grad_y)
        torch.testing.assert_close(output_and_gradients(linear, compiled, x, grad_y), expected, rtol=1e-6, atol=1e-6)
