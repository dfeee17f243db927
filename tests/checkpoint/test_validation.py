"""Claim: state that no run can have saved is refused by tensor and place, though every hash and header is right; what
runs save, in every pattern and dtype, is accepted.

Run alone: python -m pytest tests/checkpoint/test_validation.py
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from slope_dist.checkpoint import Checkpoint, CheckpointError
from slope_dist.checkpoint.inspection import count_totals, measure_layers
from slope_dist.checkpoint.validation import check_state

from .rewriting import RUNS, folder_of, opened, rewrite

FC1 = "decoder.layers.0.fc1"
BIAS, MOMENT, MASTER = f"weight/{FC1}.bias", f"exp_avg/{FC1}.bias", f"master/{FC1}.bias"
VALUES, SQUARES = f"weight/{FC1}.weight.values", f"exp_avg_sq/{FC1}.weight.values"
INDICES, MASK = f"metadata/{FC1}.weight.indices", f"metadata/{FC1}.weight.column_mask"

Spoil = Callable[[dict[str, Tensor], dict[str, Any], str], object]
"""Called with the tensors, the rest of the content and the key it is about."""


def put(value: float, *place: int) -> Spoil:
    return lambda tensors, _, key: tensors[key][place].fill_(value)


def swap(new: Callable[[Tensor], Tensor]) -> Spoil:
    return lambda tensors, _, key: tensors.update({key: new(tensors[key])})


def pattern(text: Any) -> Spoil:
    return lambda _, content, key: content["config"]["sparsity"].update(pattern=text)


def without(other: str) -> Spoil:
    return lambda tensors, _, key: tensors.pop(other)


UNKNOWN = "expected a pattern as sparsity.pattern of the config, found"
CASES: dict[str, tuple[str, str, Spoil, str]] = {
    "nan": ("data", VALUES, put(nan, 63, 15), "expected finite numbers, found nan at [63, 15]"),
    "infinite bf16": ("bf16", VALUES, put(inf, 1, 2), "expected finite numbers, found inf at [1, 2]"),
    "moment": ("data", MOMENT, put(-inf, 7), "expected finite numbers, found -inf at [7]"),
    "master": ("bf16", MASTER, put(nan, 7), "expected finite numbers, found nan at [7]"),
    "negative square": ("data", SQUARES, put(-1.0, 3, 4), "expected means of squares, found -1.0 at [3, 4]"),
    "equal positions": ("data", INDICES, put(0x45, 5, 3), "expected bytes of a 2:4 pattern, found 69 at [5, 3]"),
    "three of eight": ("bf16", INDICES, put(0b111, 9, 0), "expected bytes of a 4:8 pattern, found 7 at [9, 0]"),
    "other pattern": ("half", INDICES, pattern("2:4"), "expected bytes of a 2:4 pattern, found"),
    "other density": ("data", INDICES, pattern("2:8"), f"expected 2:8 metadata of {VALUES} [64, 16], found [64, 4]"),
    "no pattern": ("data", INDICES, pattern(None), f"{UNKNOWN} None"),
    "dense": ("data", INDICES, pattern("dense"), f"{UNKNOWN} 'dense'"),
    "mask of pruned": ("mask", MASK, put(255, 2, 1), "expected kept entries only, found 255 at [2, 1]"),
    "mask alone": ("mask", MASK, without(INDICES), "expected metadata beside the column mask, found none"),
    "mask's shape": ("mask", MASK, swap(lambda t: t[:, :2]), "expected the shape [64, 4], found [64, 2]"),
    "no values": ("data", INDICES, without(VALUES), "expected 2:4 metadata of"),
    "fp32 metadata": ("data", INDICES, swap(Tensor.float), "expected U8, found F32"),
    "byte weight": ("data", VALUES, swap(Tensor.byte), "expected floating point, found U8"),
    "moment's shape": ("data", MOMENT, swap(lambda t: t[:8]), "expected the shape [64] of its weight, found [8]"),
    "moment alone": ("data", MOMENT, without(BIAS), "expected a weight it belongs to, found [64]"),
}


@pytest.mark.parametrize("case", CASES)
def test_impossible_state_is_refused_by_name_and_place(base: Path, tmp_path: Path, case: str) -> None:
    name, key, spoil, text = CASES[case]
    folder = rewrite(folder_of(base, name), tmp_path, lambda tensors, content: spoil(tensors, content, key))
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError) as caught:
        check_state(checkpoint)
    assert str(caught.value).startswith(f"{folder}: {key}: {text}")
    # It can still be looked at.
    measure_layers(checkpoint)
    count_totals(checkpoint)


@pytest.mark.parametrize("name", RUNS)
def test_what_runs_save_is_accepted(base: Path, name: str) -> None:
    check_state(opened(folder_of(base, name)))
