"""Claims: training.deterministic holds from before CUDA is used to the end of the run and no longer, reaches cuBLAS by
the environment, which children see too, and makes two runs of a layout equal in every bit.

Run: pytest tests/training/test_deterministic.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slope_dist.parallel import environment
from tests.distributed import end_ranks
from tests.runs import pretrain, state_hash, step_rows, watch_engines, write_config

WORKSPACE = environment.CUBLAS_WORKSPACE


def watched(config: str) -> dict[str, Any]:
    """Run the entry point in this process; what is so in each step, and afterwards."""
    flags: list[bool] = []
    hashes: list[str] = []

    def watch(event: str, engine: Any, detail: Any) -> None:
        if event == "before step":
            flags.append(torch.are_deterministic_algorithms_enabled())
        if event == "after step":
            hashes.append(state_hash(engine))

    os.environ.pop(WORKSPACE, None)
    watch_engines(watch)
    code = pretrain("--config", config)
    return {
        "code": code,
        "flags": flags,
        "hashes": hashes,
        "after": torch.are_deterministic_algorithms_enabled(),
        "workspace": os.environ.get(WORKSPACE),
    }


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own."""
    [outcome] = end_ranks(function, 1, *arguments, process_group=False)
    assert outcome.code == 0, outcome.errors
    return outcome.result


def runs(corpus: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    config = write_config(folder, corpus, training__steps=4, run__log_interval=4, **changes)
    found = alone(watched, str(config))
    assert found["code"] == 0
    return found


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_two_runs_are_equal_in_every_bit(engine: str, corpus: Path, tmp_path: Path) -> None:
    setting = {"training__deterministic": True, "parallel__engine": engine}
    first, second = (runs(corpus, tmp_path / name, **setting) for name in "ab")
    assert first["flags"] == [True] * 4 and first["after"] is False and first["workspace"] == ":4096:8"
    assert first == second and len(set(first["hashes"])) == 4
    losses = [[row["loss"] for row in step_rows(tmp_path / name / "run")] for name in "ab"]
    assert losses[0] == losses[1]


def test_by_default_nothing_is_set(corpus: Path, tmp_path: Path) -> None:
    found = runs(corpus, tmp_path)
    assert (found["flags"], found["after"], found["workspace"]) == ([False] * 4, False, None)


def start_in_order(given: str | None) -> dict[str, Any]:
    """What `start` has set by the time it first asks CUDA for anything, and what a child then sees."""
    seen: list[Any] = []
    right = torch.cuda.is_available

    def asked() -> bool:
        seen.append([os.environ.get(WORKSPACE), torch.are_deterministic_algorithms_enabled()])
        return right()

    os.environ.pop(WORKSPACE, None)
    if given is not None:
        os.environ[WORKSPACE] = given
    torch.cuda.is_available = asked
    try:
        environment.start(environment.discover({}), 1, deterministic=True)
    finally:
        torch.cuda.is_available = right
    child = subprocess.run(["printenv", WORKSPACE], capture_output=True, text=True)
    during = torch.are_deterministic_algorithms_enabled()
    environment.stop()
    return {"seen": seen[0], "child": child.stdout.strip(), "during": during}


@pytest.mark.parametrize(
    ("given", "kept"), [(None, ":4096:8"), (":16:8", ":16:8"), (":0:0", ":4096:8")], ids=["unset", "small", "neither"]
)
def test_it_is_set_before_cuda_is_used_and_children_see_it(given: str | None, kept: str) -> None:
    found = alone(start_in_order, given)
    assert found == {"seen": [kept, True], "child": kept, "during": True}


def test_another_run_in_the_process_is_free_again() -> None:
    assert alone(start_twice) == [True, False]


def start_twice() -> list[bool]:
    flags = []
    for wanted in (True, False):
        environment.start(environment.discover({}), 1, deterministic=wanted)
        flags.append(torch.are_deterministic_algorithms_enabled())
        torch.distributed.destroy_process_group()
    return flags


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_two_runs_on_a_gpu_with_the_same_kernels(family: str, corpus: Path, tmp_path: Path) -> None:
    setting = {"training__deterministic": True, "precision": "bf16", "model__family": family}
    first = runs(corpus, tmp_path / "a", **setting)
    (tmp_path / "b" / "run").mkdir(parents=True)
    shutil.copy(tmp_path / "a" / "run" / "kernels.json", tmp_path / "b" / "run")
    assert runs(corpus, tmp_path / "b", **setting) == first
