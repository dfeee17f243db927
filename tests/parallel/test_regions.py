"""Each edge of the split region is what its definition says, forward and backward, on two and four real ranks.

The definitions are written out here over the list of all ranks' tensors. Entries are small whole numbers, so sums are
exact and results must be equal to the bit. Inputs and gradients are contiguous, transposed, and expanded (of stride
zero, as `sum` gives them): a collective that works on a copy of such a tensor, or sums into it, loses the result.

Run: pytest tests/parallel/test_regions.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slope_dist.parallel.layout import Layout
from slope_dist.parallel.regions import (
    TensorPlace,
    enter_split,
    enter_stream,
    leave_split,
    whole_parameter,
    whole_product,
)
from tests.distributed import run_ranks

B, S, H = 3, 8, 5

FUNCTIONS = {
    "enter_split": enter_split,
    "leave_split": leave_split,
    "enter_stream": enter_stream,
    "whole_parameter": whole_parameter,
}
STRIDES = ("contiguous", "transposed", "expanded")


def sizes(name: str, ranks: int, sequence_parallel: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a rank's input and output."""
    if name == "whole_parameter":
        return (S, H), (S, H)
    part, whole = (B, S // ranks, H), (B, S, H)
    if not sequence_parallel:
        return whole, whole
    return (part, whole) if name == "enter_split" else (whole, part)


def numbers(shape: tuple[int, ...], strides: str, seed: int) -> Tensor:
    """Whole numbers of a shape, laid out in memory as asked."""
    draw = torch.Generator().manual_seed(seed)
    if strides == "contiguous":
        return torch.randint(-9, 10, shape, generator=draw).float()
    if strides == "expanded":
        return torch.randint(-9, 10, (*shape[:-1], 1), generator=draw).float().expand(shape)
    turned = (*shape[:-2], shape[-1], shape[-2])
    return torch.randint(-9, 10, turned, generator=draw).float().transpose(-1, -2)


def through(name: str, sequence_parallel: bool, strides: str) -> dict[str, Tensor]:
    """One rank's output and input gradient."""
    from slope_dist.parallel.groups import start

    ranks = torch.distributed.get_world_size()
    groups = start(Layout(tensor=ranks))
    place = TensorPlace(groups.position.tensor, ranks, groups.tensor, sequence_parallel)
    before, after = sizes(name, ranks, sequence_parallel)
    # Stream values that every rank holds whole are the same on all.
    same = name == "enter_stream" or (name == "enter_split" and not sequence_parallel) or name == "whole_parameter"
    x = numbers(before, strides, 0 if same else place.rank).requires_grad_()
    # Kept, because reductions may work in place.
    given = x.detach().clone()
    y = FUNCTIONS[name](x, place)
    grad_y = numbers(after, strides, 100 + place.rank)
    kept = grad_y.clone()
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    return {"x": given, "y": y.detach(), "grad_y": kept, "grad_x": grad_x}


def joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=1)


def expected(name: str, sequence_parallel: bool, ranks: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """(output, input gradient) of every rank, from all ranks' inputs and output gradients."""
    xs, grads = ([rank[key] for rank in ranks] for key in ("x", "grad_y"))
    count = len(ranks)
    if name == "whole_parameter" or (name == "enter_split" and not sequence_parallel):
        return [(x, sum(grads)) for x in xs]  # type: ignore[misc]
    if name == "enter_split":
        return [(joined(xs), part) for part in sum(grads).chunk(count, dim=1)]  # type: ignore[union-attr]
    if name == "leave_split" and not sequence_parallel:
        return [(sum(xs), grad) for grad in grads]  # type: ignore[misc]
    if name == "leave_split":
        return [(part, joined(grads)) for part in sum(xs).chunk(count, dim=1)]  # type: ignore[union-attr]
    if not sequence_parallel:
        return list(zip(xs, grads, strict=True))
    return [(x.chunk(count, dim=1)[index], joined(grads)) for index, x in enumerate(xs)]


def all_through() -> list[list[Any]]:
    """Every function in every form, on this rank."""
    return [
        [name, sequence_parallel, strides, through(name, sequence_parallel, strides)]
        for name in FUNCTIONS
        for sequence_parallel in (False, True)
        for strides in STRIDES
    ]


@pytest.mark.parametrize("ranks", [2, 4])
def test_forward_and_backward_are_the_definition(ranks: int) -> None:
    results = run_ranks(all_through, ranks)
    cases = list(zip(*results, strict=True))
    assert len(cases) == len(FUNCTIONS) * 2 * len(STRIDES)
    for case in cases:
        name, sequence_parallel, strides, _ = case[0]
        found = [result for *_, result in case]
        for rank, (y, grad_x) in zip(found, expected(name, sequence_parallel, found), strict=True):
            label = f"{name}, sequence parallel {sequence_parallel}, {strides}"
            assert torch.equal(rank["y"], y), f"forward of {label}"
            assert torch.equal(rank["grad_x"], grad_x), f"backward of {label}"


def test_one_rank_alone_passes_everything_as_it_is() -> None:
    place = TensorPlace()
    x = torch.randn(B, S, H, requires_grad=True)
    for function in FUNCTIONS.values():
        assert function(x, place) is x


def test_shares_tile_a_dimension() -> None:
    shares = [TensorPlace(rank, 4).share(24) for rank in range(4)]
    assert shares == [(0, 6), (6, 12), (12, 18), (18, 24)]
    with pytest.raises(ValueError, match="26 does not divide into 4 equal parts"):
        TensorPlace(0, 4).share(26)


def product(sequence_parallel: bool) -> dict[str, Any]:
    """One rank's output and gradients of `whole_product`, and whether autograd keeps the parameter itself."""
    from slope_dist.parallel.groups import start

    ranks = torch.distributed.get_world_size()
    groups = start(Layout(tensor=ranks))
    place = TensorPlace(groups.position.tensor, ranks, groups.tensor, sequence_parallel)
    x = numbers((B, S, H), "transposed", place.rank).requires_grad_()
    parameter = torch.nn.Parameter(numbers((4, H), "contiguous", 50))
    y = whole_product(x, parameter, place)
    grad_y = numbers((B, S, 4), "transposed", 100 + place.rank)
    kept = y.grad_fn.saved_tensors  # type: ignore[union-attr]
    y.backward(grad_y)
    assert x.grad is not None and parameter.grad is not None
    return {
        "x": x.detach(),
        "parameter": parameter.detach(),
        "grad_y": grad_y,
        "y": y.detach(),
        "grad_x": x.grad,
        "grad_parameter": parameter.grad,
        "keeps the parameter": any(tensor is parameter for tensor in kept),
    }


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_product_with_a_replicated_matrix_sums_its_gradient(ranks: int) -> None:
    for sequence_parallel in (False, True):
        found = run_ranks(product, ranks, sequence_parallel)
        parameter = found[0]["parameter"]
        total = sum(torch.einsum("bso,bsi->oi", rank["grad_y"], rank["x"]) for rank in found)
        for rank in found:
            assert torch.equal(rank["y"], rank["x"] @ parameter.t())
            assert torch.equal(rank["grad_x"], rank["grad_y"] @ parameter)
            assert torch.equal(rank["grad_parameter"], total)
            assert rank["keeps the parameter"] is True
