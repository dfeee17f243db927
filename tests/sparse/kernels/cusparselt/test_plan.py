"""Plans are made by the library's rules, once for each kind of product, run by one call, and destroyed when dropped.

Run: pytest tests/sparse/kernels/cusparselt/test_plan.py
"""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from slope_dist.sparse.kernels.cusparselt import Algorithm, CusparseltRoute
from slope_dist.sparse.kernels.cusparselt.library import StatusError
from tests.sparse.kernels.cusparselt.conftest import StandIn
from tests.sparse.kernels.cusparselt.operands import Operands

pytestmark = pytest.mark.usefixtures("nan_scratch")

T, O, I = 24, 32, 48  # noqa: E741
ROW, COLUMN, BFLOAT16 = 2, 1, 14

MAKING = [
    "StructuredDescriptorInit",
    "DenseDescriptorInit",
    "DenseDescriptorInit",
    "DenseDescriptorInit",
    "MatmulDescriptorInit",
    "MatmulAlgSelectionInit",
    "MatmulAlgSetAttribute",
    "MatmulAlgSetAttribute",
    "MatmulPlanInit",
    "MatmulGetWorkspace",
]


@pytest.fixture
def operands() -> Operands:
    return Operands(T, O, I, torch.bfloat16)


@pytest.fixture
def route(standin: StandIn) -> CusparseltRoute:
    route = standin.route()
    standin.forget_calls()
    return route


def product(route: CusparseltRoute, operands: Operands, config: int = 0, **extra: Tensor) -> Tensor:
    """A product whose metadata the caller has, so that no layout is asked for."""
    metadata = torch.zeros(operands.indices.numel(), dtype=torch.uint8)
    return route.product(operands.x, operands.values, operands.indices, metadata, Algorithm(config), **extra)


def test_a_first_product_makes_a_plan_and_runs_it(standin: StandIn, route: CusparseltRoute, operands: Operands) -> None:
    y = product(route, operands, config=1)
    assert standin.names == [*MAKING, "Matmul"]
    calls = standin.calls
    handle = calls[0].arguments[0]
    assert all(call.arguments[0] == handle for call in calls)
    weight, x, addend, result = (call.arguments[1] for call in calls[:4])
    assert calls[0].arguments[2:9] == (O, I, I, 16, BFLOAT16, ROW, 0)
    assert calls[1].arguments[2:8] == (T, I, I, 16, BFLOAT16, ROW)
    assert calls[2].arguments[2:8] == calls[3].arguments[2:8] == (O, T, O, 16, BFLOAT16, COLUMN)
    assert calls[4].arguments[2:9] == (0, 1, weight, x, addend, result, 2)
    assert [call.arguments[2:5] for call in calls[6:8]] == [(0, 1, 4), (3, 1, 4)]
    run = calls[10].arguments
    assert run[1] == calls[8].arguments[1]
    assert run[4] == operands.x.data_ptr() and run[6] == run[7] == y.data_ptr()
    assert run[8] != 0 and run[9:11] == (0, 1)


@pytest.mark.parametrize("config", [0, 1], ids=["without workspace", "with workspace"])
def test_a_product_seen_before_is_one_call(
    standin: StandIn, route: CusparseltRoute, operands: Operands, config: int
) -> None:
    bias, addend = torch.zeros(O).bfloat16(), torch.zeros(T, O).bfloat16()
    for extra in ({}, {"bias": bias}, {"addend": addend}, {"bias": bias, "addend": addend}):
        product(route, operands, config, **extra)
        standin.forget_calls()
        for _ in range(3):
            product(route, operands, config, **extra)
        assert standin.names == ["Matmul"] * 3


def test_products_of_other_kinds_have_plans_of_their_own(
    standin: StandIn, route: CusparseltRoute, operands: Operands
) -> None:
    bias, other_bias, addend = torch.zeros(O).bfloat16(), torch.zeros(O).bfloat16(), torch.zeros(T, O).bfloat16()
    kinds = [
        lambda: product(route, operands),
        lambda: product(route, operands, config=2),
        lambda: product(route, operands, bias=bias),
        lambda: product(route, operands, bias=other_bias),
        lambda: product(route, operands, addend=addend),
        lambda: product(route, Operands(T + 8, O, I, torch.bfloat16)),
        lambda: product(route, Operands(T, O + 16, I, torch.bfloat16)),
        lambda: product(route, Operands(T, O, I + 16, torch.bfloat16)),
        lambda: product(route, Operands(T, O, I, torch.float16)),
    ]
    for _ in range(2):
        for kind in kinds:
            kind()
    assert standin.names.count("MatmulPlanInit") == len(kinds)
    assert [call.arguments[3] for call in standin.calls if call.name == "MatmulDescSetAttribute"] == [
        bias.data_ptr(),
        other_bias.data_ptr(),
    ]


def test_tokens_are_padded_to_eights_and_share_a_plan(
    standin: StandIn, route: CusparseltRoute, operands: Operands
) -> None:
    for tokens in (17, 20, 24):
        short = Operands(tokens, O, I, torch.bfloat16)
        assert product(route, short).shape == (tokens, O)
    assert standin.names.count("MatmulPlanInit") == 1


DESTROYING = ["MatmulPlanDestroy", "MatmulAlgSelectionDestroy", *["MatDescriptorDestroy"] * 4]


def test_the_plan_used_longest_ago_is_destroyed_when_there_are_too_many(standin: StandIn, operands: Operands) -> None:
    route = standin.route(plans=2)
    product(route, operands, config=0)
    first = next(call.arguments[1] for call in standin.calls if call.name == "MatmulPlanInit")
    product(route, operands, config=1)
    second = [call.arguments[1] for call in standin.calls if call.name == "MatmulPlanInit"][1]
    product(route, operands, config=0)
    standin.forget_calls()
    product(route, operands, config=2)
    destroyed = [call for call in standin.calls if "Destroy" in call.name]
    assert [call.name for call in destroyed] == DESTROYING
    assert destroyed[0].arguments[0] == second != first
    assert standin.live == 2 * len(DESTROYING)
    standin.forget_calls()
    product(route, operands, config=0)
    assert standin.names == ["Matmul"]


def test_nothing_is_left_of_a_route_that_is_dropped(standin: StandIn, operands: Operands) -> None:
    route = standin.route()
    route.metadata_layout(O, I, torch.bfloat16)
    product(route, operands, bias=torch.zeros(O).bfloat16())
    assert standin.live
    del route
    gc.collect()
    assert standin.live == 0


@pytest.mark.parametrize("config", [1, 9], ids=["no plan", "no such algorithm"])
def test_a_plan_that_fails_leaves_nothing_and_is_not_kept(
    standin: StandIn, route: CusparseltRoute, operands: Operands, config: int
) -> None:
    standin.set(failing_algorithm=1)
    status = {1: "cusparseLtMatmulPlanInit returned CUSPARSE_STATUS_NOT_SUPPORTED", 9: "AlgSetAttribute returned"}
    for _ in range(2):
        with pytest.raises(StatusError, match=status[config]) as caught:
            product(route, operands, config)
        assert "\n" not in str(caught.value)
        del caught
        gc.collect()
        assert standin.live == 0 and "Matmul" not in standin.names
    product(route, operands, config=0)
    assert standin.live == len(DESTROYING)
