"""Loading refuses numbers that no run can have saved, and no others.

Run: pytest tests/engine/test_loading.py
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slope_dist.engine.loading import load_fragments
from slope_dist.errors import UserError
from slope_dist.parallel.fragments import Fragment, Kind, MemorySource, whole


def fragment(tensor: Tensor, kind: Kind) -> Fragment:
    return Fragment("layer.weight", kind, tuple(tensor.shape), whole(tuple(tensor.shape)), 0, tensor.numel(), tensor)


def loaded(values: list[float], dtype: torch.dtype, kind: Kind) -> list[float]:
    live = torch.zeros(len(values), dtype=dtype)
    source = MemorySource.take([fragment(torch.tensor(values, dtype=dtype), kind)], {})
    load_fragments(source, [fragment(live, kind)], {})
    return live.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_numbers_are_loaded_though_their_sum_is_none(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    values = [largest, largest, -0.0, 1.0]
    assert not torch.tensor(values, dtype=dtype).sum().isfinite()
    assert loaded(values, dtype, "weight") == values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["weight", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("bad", [[float("nan")], [float("inf")], [float("-inf"), float("inf")]])
def test_what_is_no_number_is_refused(dtype: torch.dtype, kind: Kind, bad: list[float]) -> None:
    with pytest.raises(UserError, match=f"NaN or infinity in {kind} layer.weight"):
        loaded([1.0, *bad, 2.0], dtype, kind)


def test_a_mean_of_squares_is_not_negative() -> None:
    assert loaded([0.0, -0.0, 3.0], torch.float32, "exp_avg_sq") == [0.0, 0.0, 3.0]
    with pytest.raises(UserError, match="negative mean of squares"):
        loaded([1.0, -1e-38], torch.float32, "exp_avg_sq")
    assert loaded([1.0, -1e-38], torch.float32, "exp_avg")[1] < 0
