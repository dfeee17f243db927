"""Predictions of measured steps: every rival of every cell once, the same arithmetic as the planner's, misses told.

The files are made up: no card has been measured yet.

Run: pytest tests/benchmark/test_prediction.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slope_dist.benchmark import block
from slope_dist.benchmark.prediction import compare, predict_step
from slope_dist.benchmark.random_models import with_layers
from slope_dist.config import Config, load_config
from slope_dist.errors import UserError
from slope_dist.planning.gpus import Peaks
from slope_dist.planning.products import Roofline
from slope_dist.planning.step_time import Machine
from tests.distributed import ROOT

PEAKS = Peaks(dense=1e14, sparse=2e14, bandwidth=1e12)
MACHINE = Machine(Roofline("h200-141gb", PEAKS), PEAKS)
TOKENS = 4096


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(ROOT / "configs/opt1.3b.json")


def results(path: Path, benchmark: str, rivals: dict[str, Any], **more: Any) -> Path:
    row = {"cell": "opt1.3b", "config": "opt1.3b", "tokens": TOKENS, "dtype": "bfloat16", "rivals": rivals} | more
    path.write_text(json.dumps({"benchmark": benchmark, "machine": {"device": "NVIDIA H200"}, "rows": [row]}))
    return path


def test_sparse_blocks_are_predicted_faster_and_whole_models_are_their_layers(config: Config) -> None:
    dense, resident, derived, adapters = (
        predict_step(config, TOKENS, form, MACHINE, whole=False) for form in block.forms(config)
    )
    # With one micro-batch a step, transposes are made as often either way.
    assert resident == pytest.approx(derived) and resident < dense and resident < adapters
    form = block.forms(config)[0]
    two, four = (predict_step(with_layers(config, n), TOKENS, form, MACHINE, whole=True) for n in (2, 4))
    recomputed = config.training.recompute == "blocks"
    assert recomputed or four - two == pytest.approx(2 * dense, rel=1e-6)
    assert two > 2 * dense


@pytest.mark.parametrize("benchmark", ["block", "step"])
def test_every_rival_is_compared(benchmark: str, config: Config, tmp_path: Path) -> None:
    whole = benchmark == "step"
    small = with_layers(config, 3) if whole else config
    rivals = {
        form.name: {"seconds": predict_step(small, TOKENS, form, MACHINE, whole=whole) * factor}
        for form, factor in zip(block.forms(small), (1.0, 1.1, 0.9, 1.5), strict=True)
    }
    rivals["dense, again"] = {"seconds": 1.0}
    path = results(tmp_path / "r.json", benchmark, rivals, **({"layers": 3} if whole else {}))
    found = list(compare(path, benchmark, {"opt1.3b": config}, "h200-141gb", MACHINE))
    assert [(p.rival, p.is_close) for p in found] == [
        ("dense", True),
        ("resident", True),
        ("derived", True),
        ("adapters", False),
    ]
    assert found[1].ratio == pytest.approx(1 / 1.1)


def test_rows_are_predicted_in_their_own_precision(config: Config, tmp_path: Path) -> None:
    path = results(tmp_path / "r.json", "block", {"dense": {"seconds": 1.0}}, dtype="float32")
    with pytest.raises(UserError, match="nothing that was measured in bfloat16, but in float32"):
        list(compare(path, "block", {"opt1.3b": config}, "h200-141gb", MACHINE))
    (wide,) = compare(path, "block", {"opt1.3b": config}, "h200-141gb", MACHINE, "fp32")
    results(path, "block", {"dense": {"seconds": 1.0}})
    (narrow,) = compare(path, "block", {"opt1.3b": config}, "h200-141gb", MACHINE)
    assert wide.predicted > narrow.predicted


def test_what_is_wrong_is_one_line(config: Config, tmp_path: Path) -> None:
    path = results(tmp_path / "r.json", "block", {"dense": {"seconds": 1.0}}, config="opt9b")
    with pytest.raises(UserError, match="is of the model opt9b, which is not in configs/"):
        list(compare(path, "block", {"opt1.3b": config}, "h200-141gb", MACHINE))
    with pytest.raises(UserError, match=r'is no file of results of "tools/benchmark.py step"'):
        list(compare(path, "step", {}, "h200-141gb", MACHINE))
    with pytest.raises(UserError, match='was measured on "NVIDIA H200", which is no a100-80gb'):
        list(compare(path, "block", {"opt1.3b": config}, "a100-80gb", MACHINE))
    results(path, "block", {"dense": {}})
    with pytest.raises(UserError, match="is damaged: KeyError"):
        list(compare(path, "block", {"opt1.3b": config}, "h200-141gb", MACHINE))
