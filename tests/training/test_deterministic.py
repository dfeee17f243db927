"""training.deterministic: torch and cuBLAS are told before anything is computed, for that run alone.

That a repeated run then has the same bits is for a card to show: on a CPU it has them anyway.

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
from tests.runs import write_config


def told(config: str) -> dict[str, Any]:
    """Train by the entry point; returns what held while the trainer was made, and after the run."""
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    seen: dict[str, Any] = {}
    start = Trainer.run

    def run(self: Trainer) -> None:
        seen["during"] = torch.are_deterministic_algorithms_enabled()
        seen["filled"] = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        seen["cublas"] = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        start(self)

    Trainer.run = run  # type: ignore[method-assign]
    seen["code"] = pretrain(Request(config))
    seen["after"] = torch.are_deterministic_algorithms_enabled()
    seen["filled after"] = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    return seen


@pytest.mark.parametrize("deterministic", [False, True])
def test_who_is_told(deterministic: bool, corpus: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, corpus, training__deterministic=deterministic)
    [outcome] = end_ranks(told, 1, str(path), process_group=False)
    assert outcome.result == {
        "during": deterministic,
        # What every allocation would be written once more for.
        "filled": not deterministic,
        "cublas": ":4096:8" if deterministic else None,
        "code": 0,
        "after": False,
        "filled after": True,
    }
