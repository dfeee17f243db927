"""From a layer through operators, dispatcher, binding and stand-in: what it computes is the reference's, with one call.

The stand-in has an algorithm that is wrong and one that is refused; the dispatcher must find both. Nothing here says
what the real library does on a card.

Run: pytest tests/sparse/kernels/cusparselt/test_through_dispatcher.py
"""

from __future__ import annotations

import pytest
import torch

from slope_dist.layers.linear import Linear, LowRankAdapter
from slope_dist.sparse import CompressedMatrix, Pattern, SparseWeight, kernels
from slope_dist.sparse.kernels import measuring
from slope_dist.sparse.kernels.dispatch import Arrangement, Dispatcher
from tests.sparse.kernels.cusparselt.conftest import StandIn
from tests.sparse.kernels.vendors import preferring, vendors

CPU = torch.device("cpu")
TOKENS, OUT, IN = 24, 64, 32


def layer(dtype: torch.dtype, *, resident: bool) -> Linear:
    torch.manual_seed(1)
    weight = SparseWeight(CompressedMatrix.prune(torch.randn(OUT, IN), Pattern(2, 4)), resident_transpose=resident)
    adapter = LowRankAdapter(torch.randn(8, IN), OUT, split="column")
    made = Linear("layer", weight, bias=True, split="column", adapter=adapter)
    with torch.no_grad():
        adapter.up.normal_()
        made.bias.normal_()  # type: ignore[union-attr]
    return made.to(dtype)


def step(made: Linear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Output and all gradients for numbers of `dtype`, in the precision of the layer."""
    torch.manual_seed(2)
    x, grad_y = (torch.randn(TOKENS, size).to(dtype).to(made.weight.values.dtype) for size in (IN, OUT))
    made.zero_grad()
    y = made(x.requires_grad_())
    y.backward(grad_y)
    assert x.grad is not None
    gradients = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad} | gradients


@pytest.mark.parametrize("arrangement", ["in place", "kept", "derived"])
@pytest.mark.parametrize("resident", [False, True], ids=["derived", "resident"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_a_training_step(standin: StandIn, dtype: torch.dtype, resident: bool, arrangement: Arrangement) -> None:
    made = layer(dtype, resident=resident)
    expected = step(made.double(), dtype)
    made = layer(dtype, resident=resident)
    dispatcher = Dispatcher(
        CPU, vendors(standin.route()), timer=preferring("cuSPARSELt/1", "transpose"), arrangement=arrangement
    )
    with kernels.using(dispatcher):
        # The first measures.
        step(made, dtype)
        made.weight.prepare_kernels()  # type: ignore[attr-defined]
        made.weight.values_changed()  # type: ignore[attr-defined]
        step(made, dtype)
        standin.forget_calls()
        found = step(made, dtype)
    for name, value in expected.items():
        error = torch.linalg.vector_norm(found[name].double() - value) / torch.linalg.vector_norm(value)
        assert error <= 2 * measuring.bound(dtype, OUT), name
    # Forward, and the input gradient; plans, layouts and algorithms were there.
    assert standin.names == ["Matmul", "Matmul"]


def test_wrong_and_refused_algorithms_are_found(standin: StandIn) -> None:
    standin.set(wrong_algorithm=1, failing_algorithm=2)
    dispatcher = Dispatcher(CPU, vendors(standin.route()), timer=preferring("cuSPARSELt/1 1", "cuSPARSELt"))
    choice = dispatcher.product_choice(kernels.Problem(TOKENS, OUT, IN, torch.bfloat16, CPU))
    reasons = {label.split()[-1]: reason for label, reason in choice.rejected.items() if "/1 " in label}
    assert reasons["1"].startswith("wrong") and "cusparseLt" in reasons["2"]
    assert choice.vendor == "cuSPARSELt" and choice.algorithm not in reasons


def test_what_the_library_cannot_do_is_left_to_the_others(standin: StandIn) -> None:
    dispatcher = Dispatcher(CPU, vendors(standin.route()))
    for problem in (
        kernels.Problem(TOKENS, OUT, IN, torch.float32, CPU),
        kernels.Problem(TOKENS, 24, 40, torch.bfloat16, CPU),
    ):
        assert dispatcher.product_choice(problem).vendor == ""
    route = dispatcher.vendors.routes[0]
    # Versions differ in what they get right; the first line has it even when nothing is to be said of the library.
    first, *others = dispatcher.report()
    assert f"cuSPARSELt {route.version}" in first and route.version.count(".") == 2
    assert f"cuSPARSELt {route.version}: not yet proven on a card" in others
