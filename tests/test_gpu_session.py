"""tools/gpu_session.sh runs its stages in order, goes on after one that fails, and ends with a code that says so.

An executable that only writes down how it was called stands in for Python.

Run: pytest tests/test_gpu_session.py
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "gpu_session.sh"
STAGES = ["tests", "gemm", "block", "step", "decode", "refresh"]

PYTHON = """#!/bin/sh
case "$1 $2" in
  "-c import torch"*) echo "{card}" ;;
  "-c import importlib"*) case "$2" in *{missing}*) exit 1 ;; esac ;;
  *) echo "$@" >>{calls}; echo "said $2"; case "$2" in {failing}) exit 3 ;; esac ;;
esac
"""


@pytest.fixture
def session(tmp_path: Path):
    def run(*arguments: str, failing: str = "none", missing: str = "nothing", card: str = "NVIDIA H200"):
        python, calls = tmp_path / "python", tmp_path / "calls"
        python.write_text(PYTHON.format(card=card, missing=missing, failing=failing, calls=calls))
        python.chmod(0o755)
        calls.write_text("")
        command = [str(SCRIPT), "--python", str(python), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        return done, [line.split() for line in calls.read_text().splitlines()]

    return run


def stages_of(calls: list[list[str]]) -> list[str]:
    return ["tests" if call[1] == "pytest" else call[1] for call in calls]


def test_stages_run_in_order_and_leave_logs(session, tmp_path: Path) -> None:
    done, calls = session(str(tmp_path / "logs"))
    assert done.returncode == 0, done.stderr
    assert stages_of(calls) == STAGES
    assert calls[0] == ["-m", "pytest", "-m", "gpu", "-rs", "tests"]
    assert calls[1][:4] == ["tools/benchmark.py", "gemm", "--output", "docs/results/gemm-nvidia-h200.json"]
    assert [(tmp_path / "logs" / f"{stage}.log").read_text()[:4] for stage in STAGES] == ["said"] * 6


def test_a_failing_stage_is_named_and_the_others_run(session, tmp_path: Path) -> None:
    done, calls = session(str(tmp_path / "logs"), failing="pytest|block")
    assert done.returncode == 1
    assert stages_of(calls) == STAGES
    assert done.stdout.splitlines()[-1] == "failed: tests block"
    assert f"block: failed with code 3, see {tmp_path}/logs/block.log" in done.stdout


def test_a_list_runs_nothing_and_shares_the_minutes(session, tmp_path: Path) -> None:
    done, calls = session("--list", "--minutes", "100", str(tmp_path / "logs"), "decode", "gemm", card="")
    assert done.returncode == 0 and calls == [] and not (tmp_path / "logs").exists()
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["decode", "gemm"]
    assert "--minutes 20" in lines[0] and "--minutes 35" in lines[1]


@pytest.mark.parametrize("missing", ["deepspeed", "megatron"])
def test_without_a_library_of_the_trainers_its_tests_are_left_out_and_it_is_said(
    missing: str, session, tmp_path: Path
) -> None:
    done, calls = session(str(tmp_path / "logs"), "tests", missing=missing)
    assert calls == [["-m", "pytest", "-m", "gpu", "-rs", "tests/sparse"]]
    assert "without deepspeed and megatron-core" in done.stdout


@pytest.mark.parametrize(
    "arguments", [[], ["logs", "nope"], ["--minutes", "x", "logs"], ["--minutes"], ["--wrong", "logs"]], ids=str
)
def test_what_it_does_not_know_is_refused(arguments: list[str], session) -> None:
    done, calls = session(*arguments)
    assert done.returncode == 2 and calls == []
    assert done.stdout + done.stderr


def test_without_a_card_nothing_runs(session, tmp_path: Path) -> None:
    done, calls = session(str(tmp_path / "logs"), card="")
    assert done.returncode == 2 and calls == [] and "no CUDA device" in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shellcheck_finds_nothing() -> None:
    assert subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True).stdout == b""
