"""training.deterministic: torch and cuBLAS are told before anything is computed, for that run alone; twice the same.

Run: pytest tests/training/test_deterministic.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from slope_dist.training.entry import Request, pretrain
from slope_dist.training.trainer import Trainer
from tests.distributed import end_ranks
from tests.runs import newest, read_all, same_bits, step_rows, write_config


def told(config: str) -> dict[str, Any]:
    """Train by the entry point; returns what held while the trainer was made, and after the run."""
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    seen: dict[str, Any] = {}
    start = Trainer.run

    def run(self: Trainer) -> None:
        seen["during"] = torch.are_deterministic_algorithms_enabled()
        seen["cublas"] = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        start(self)

    Trainer.run = run  # type: ignore[method-assign]
    seen["code"] = pretrain(Request(config))
    seen["after"] = torch.are_deterministic_algorithms_enabled()
    return seen


@pytest.mark.parametrize("deterministic", [False, True])
def test_who_is_told(deterministic: bool, corpus: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, corpus, training__deterministic=deterministic)
    [outcome] = end_ranks(told, 1, str(path), process_group=False)
    assert outcome.result == {
        "during": deterministic,
        "cublas": ":4096:8" if deterministic else None,
        "code": 0,
        "after": False,
    }


def test_twice_the_same_bits(corpus: Path, tmp_path: Path) -> None:
    runs = []
    for name in ("first", "second"):
        path = write_config(tmp_path / name, corpus, training__deterministic=True)
        [outcome] = end_ranks(told, 1, str(path), process_group=False)
        assert outcome.result["code"] == 0, outcome.errors
        runs.append(tmp_path / name / "run")
    rows = [[(row["loss"], row["grad_norm"]) for row in step_rows(run)] for run in runs]
    assert rows[0] == rows[1]
    first, second = (read_all(newest(run), "master") for run in runs)
    assert first.keys() == second.keys() and all(same_bits(first[name], second[name]) for name in first)
