"""A right path passes the benchmark's check, a wrong one is never timed, and rivals are what they claim to be.

Run: pytest tests/benchmark/test_layer.py
"""

from __future__ import annotations

import pytest
import torch

from slope_dist.benchmark import layer
from slope_dist.benchmark.timing import WrongResultError
from slope_dist.sparse import reference
from slope_dist.sparse.kernels import measuring

CPU = torch.device("cpu")


def case(dtype: torch.dtype = torch.float32) -> layer.Case:
    return layer.Case(16, 64, 96, dtype, CPU)


@pytest.mark.parametrize("rival", [layer.DERIVED, layer.RESIDENT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_right_paths_pass(dtype: torch.dtype, rival: str) -> None:
    errors = layer.check(case(dtype), rival)
    assert set(errors) == {"output", "input_gradient", "weight_gradient"}
    assert max(errors.values()) < measuring.bound(dtype, 64)


@pytest.mark.parametrize(
    ("product", "named"),
    [("forward", "output"), ("input_gradient", "input_gradient"), ("weight_gradient", "weight_gradient")],
)
@pytest.mark.parametrize("spoil", [1.001, float("nan")])
def test_a_wrong_path_is_not_timed(product: str, named: str, spoil: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(reference, product)
    monkeypatch.setattr(reference, product, lambda *arguments: right(*arguments) * spoil)
    monkeypatch.setattr(layer.timing, "in_turns", lambda *arguments: pytest.fail("a wrong path was timed"))
    with pytest.raises(WrongResultError, match=f"64 -> 96, float32, 16 tokens, derived: {named} is off"):
        layer.measure_time(case(), seconds=0)


def test_an_input_gradient_over_the_singly_pruned_weight_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def singly(grad_y, values, indices, pattern, column_mask):
        return grad_y @ reference.codec.expand(values, indices, pattern)

    monkeypatch.setattr(reference, "input_gradient", singly)
    with pytest.raises(WrongResultError, match="input_gradient"):
        layer.check(case(), layer.DERIVED)


def test_the_numbers_of_every_rival() -> None:
    numbers = layer.measure_time(case(torch.bfloat16), seconds=0)
    assert list(numbers) == list(layer.RIVALS)
    dense, derived = numbers[layer.DENSE], numbers[layer.DERIVED]
    assert dense["ratio"] == dense["ratio_q1"] == dense["ratio_q3"] == 1
    assert dense["rounds"] == derived["rounds"] == layer.timing.MIN_ROUNDS
    # bf16: dense 16 bits an element, sparse 9, both with a bias.
    assert dense["held_bytes"] == 64 * 96 * 2 + 96 * 2
    assert derived["held_bytes"] == 64 * 96 * 9 // 8 + 96 * 2
    assert derived["ratio_q1"] <= derived["ratio"] <= derived["ratio_q3"]


def test_a_resident_transpose_is_rebuilt_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    whole = layer.SparseWeight.transpose

    def noted(weight: layer.SparseWeight) -> tuple[torch.Tensor, torch.Tensor]:
        built.append(weight._transpose is None)
        return whole(weight)

    monkeypatch.setattr(layer.SparseWeight, "transpose", noted)
    step = layer.stepper(case(), layer.RESIDENT)
    step()
    step()
    assert built == [True, True]


def test_cases_are_the_squares_and_the_projections_of_every_dtype() -> None:
    made = list(layer.cases([8, 16], [8], 4, [torch.float32, torch.bfloat16], CPU))
    assert [(c.in_features, c.out_features) for c in made if c.dtype == torch.float32] == [
        (8, 8),
        (16, 16),
        (8, 32),
        (32, 8),
    ]
    assert len(made) == 8 and all(c.tokens == 4 for c in made)
