"""Claim: a comparison of two checkpoints finds every difference, of what they say and of every bit they hold, and no
other, whatever layouts wrote them.

Run alone: python -m pytest tests/checkpoint/test_comparison.py
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from slope_dist.checkpoint.comparison import ABSENT, compare

from .rewriting import RUNS, folder_of, opened, raw_bytes, raw_tensors, rewrite

FC1 = "decoder.layers.0.fc1"
VALUES, INDICES = f"weight/{FC1}.weight.values", f"metadata/{FC1}.weight.indices"


def test_a_comparison_measures_what_differs(base: Path, tmp_path: Path) -> None:
    folder = folder_of(base, "data")
    before = raw_tensors(folder)
    bias, norm = f"weight/{FC1}.bias", "weight/decoder.final_layer_norm.weight"

    def change(tensors: dict[str, torch.Tensor], content: dict[str, Any]) -> None:
        tensors[VALUES][3, 4] += 0.25
        tensors[VALUES][60, 1] -= 0.5
        tensors[INDICES][0, 0] = 0x4E
        tensors[INDICES][1, 0] = 0x44
        tensors[norm] = tensors[norm].bfloat16()
        tensors["weight/added"] = torch.ones(3)
        tensors[f"exp_avg/{FC1}.bias"] = torch.zeros(2, 32)
        tensors[f"exp_avg_sq/{FC1}.bias"][0] = math.nan
        tensors[f"weight/{FC1}.adapter.up"].copy_(-torch.zeros(64, 8))
        del tensors[bias]
        content["config"]["parallel"]["tensor"] = 2
        content["scalars"]["tokens"] = float(content["scalars"]["tokens"])
        content["identity"]["new"] = {"list": [1]}
        del content["identity"]["seed"]

    before_up = before[f"weight/{FC1}.adapter.up"].clone()
    here, there = opened(rewrite(folder, tmp_path, change)), opened(folder)
    found = compare(here, there)
    assert not found.equal and (found.only_here, found.only_there) == (["weight/added"], [bias])
    assert found.compared == len(before) - 1
    tensors = {row.key: row for row in found.tensors}
    assert (tensors[VALUES].elements, tensors[VALUES].of, tensors[VALUES].form) == (2, before[VALUES].numel(), "")
    assert math.isclose(tensors[VALUES].largest, 0.5, rel_tol=1e-6)
    expected = math.hypot(0.25, 0.5) / float(before[VALUES].double().norm())
    assert math.isclose(tensors[VALUES].relative, expected, rel_tol=1e-6)
    changed = (raw_tensors(here.path)[INDICES] != before[INDICES]).sum()
    assert tensors[INDICES][2:] == (changed, 256, None, None)
    assert tensors[norm].form == "F32 [32] there, BF16 [32] here" and 0 < tensors[norm].relative < 0.01
    assert tensors[f"exp_avg/{FC1}.bias"].form == "F32 [64] there, F32 [2, 32] here"
    assert tensors[f"exp_avg/{FC1}.bias"].largest is None
    assert math.isnan(tensors[f"exp_avg_sq/{FC1}.bias"].largest)
    assert math.isnan(tensors[f"exp_avg_sq/{FC1}.bias"].relative)
    up = tensors[f"weight/{FC1}.adapter.up"]
    assert up.elements == 512 and up.largest == float(before_up.abs().max())
    assert len(tensors) == 6
    assert {".".join(field.path): (field.there, field.here) for field in found.fields} == {
        "config.parallel.tensor": (1, 2),
        "scalars.tokens": (there.scalars["tokens"], here.scalars["tokens"]),
        "identity.new.list": (ABSENT, [1]),
        "identity.seed": (7, ABSENT),
    }
    turned = compare(there, here)
    assert (turned.only_here, turned.only_there) == (found.only_there, found.only_here)


def test_negative_zero_is_a_difference_of_zero(base: Path, tmp_path: Path) -> None:
    zero = rewrite(folder_of(base, "data"), tmp_path / "a", lambda tensors, _: tensors[VALUES][0, 0].fill_(0.0))
    negative = rewrite(zero, tmp_path / "b", lambda tensors, _: tensors[VALUES][0, 0].fill_(-0.0))
    [row] = compare(opened(negative), opened(zero)).tensors
    assert row == (VALUES, "", 1, 1024, 0.0, 0.0)


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_equals_itself_in_another_layout(base: Path, tmp_path: Path, name: str) -> None:
    folder = folder_of(base, name)
    found = compare(opened(rewrite(folder, tmp_path)), opened(folder))
    assert found.equal and not found.fields and found.compared == len(raw_bytes(folder))


def test_two_layouts_of_a_run_differ_in_what_is_said_of_them(base: Path) -> None:
    found = compare(opened(folder_of(base, "tensor")), opened(folder_of(base, "mask")))
    paths = {".".join(field.path) for field in found.fields}
    assert {"config.parallel.tensor", "config.sparsity.column_mask_interval", "config.adapters.rank"} <= paths
    assert found.only_there and not found.only_here
