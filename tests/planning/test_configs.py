"""Every config of a model states a cluster on which its layout fits, and docs/configs.md has its numbers.

Run: pytest tests/planning/test_configs.py
All configs through the planner and --dry-run: pytest tests/planning/test_configs.py -m slow
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from slope_dist.config import Config, derive, load_config
from slope_dist.planning import GPU_MEMORY
from slope_dist.training.forecast import MARGIN, forecast
from tests.distributed import ROOT

NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.json") if path.stem != "tiny")
QUICK = ("gpt2-small", "opt66b")
EACH = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in NAMES]


def read(name: str) -> Config:
    return load_config(ROOT / f"configs/{name}.json")


def rows(heading: str) -> dict[str, list[str]]:
    """The cells of the first table below a heading of docs/configs.md, by the first of each row."""
    text = (ROOT / "docs/configs.md").read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\| (.*) \|$", text, flags=re.M)
    cells = [line.split(" | ") for line in lines]
    return {first: rest for first, *rest in cells if first in NAMES}


def test_the_page_has_the_hyper_parameters_of_every_config() -> None:
    table = rows("Hyper-parameters")
    assert sorted(table) == NAMES
    for name, found in table.items():
        config = read(name)
        training, length = config.training, config.model.sequence_length
        tokens = training.steps * training.global_batch_size * length
        assert found == [
            f"{training.learning_rate:g}, {training.min_learning_rate:g}",
            f"{training.warmup_steps:,}",
            f"{training.global_batch_size:,} x {length:,}",
            f"{training.steps:,}",
            f"{tokens / 1e9:,.0f}B",
            training.schedule,
        ]
        assert (training.weight_decay, training.beta1, training.beta2) == (0.1, 0.9, 0.95)
        assert (training.gradient_clipping, config.adapters.rank, config.adapters.fraction) == (1.0, 0.0156, 0.01)


def test_the_page_has_the_layout_of_every_config() -> None:
    table = rows("Layouts")
    assert sorted(table) == NAMES
    for name, found in table.items():
        config = read(name)
        parallel, derived = config.parallel, derive(config)
        assert parallel.gpu is not None and parallel.gpus == derived.world_size
        sequence = " (sequence)" if parallel.sequence_parallel else ""
        assert found[:4] == [
            f"{parallel.gpus} x {parallel.gpu}",
            f"{parallel.tensor}{sequence} x {parallel.pipeline} x {derived.data_ranks}",
            f"{parallel.zero_stage}",
            f"{config.training.micro_batch_size}, {config.training.recompute}",
        ]


@pytest.mark.parametrize("name", EACH)
def test_the_planner_says_that_it_fits(name: str) -> None:
    config = read(name)
    most = max(stage.most for stage in forecast(config, derive(config), on_gpu=True))
    assert config.parallel.gpu is not None and MARGIN * most <= GPU_MEMORY[config.parallel.gpu]
    assert rows("Layouts")[name][4] == f"{most / 2**30:.1f} GiB"


@pytest.mark.parametrize("name", EACH)
def test_a_dry_run_says_it_too(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "launch/pretrain.py", "--config", f"configs/{name}.json", "--dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert f"fits on {read(name).parallel.gpu} with " in done.stdout
