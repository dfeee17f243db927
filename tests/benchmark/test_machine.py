"""What a number was measured on: the commit, also where the repository did not come along.

Run: pytest tests/benchmark/test_machine.py
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from slope_dist.benchmark import machine


@pytest.fixture
def no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slope_dist").mkdir()
    (tmp_path / "slope_dist" / "a.py").write_text("a = 1\n")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv(machine.COMMIT_VARIABLE, raising=False)


@pytest.mark.usefixtures("no_repository")
def test_outside_a_repository_the_environment_names_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.describe(torch.device("cpu"))["commit"] is None
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "abc")
    facts = machine.describe(torch.device("cpu"))
    # The hash of the code says whether it is still the same.
    assert facts["commit"] == "abc" and facts["changes"] == machine.changes() is not None


def test_in_a_repository_git_knows_better(monkeypatch: pytest.MonkeyPatch) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=machine.ROOT, capture_output=True, text=True)
    if head.returncode:
        pytest.skip("this is no repository")
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "abc")
    commit = machine.commit()
    assert commit is not None and commit.partition("+")[0] == head.stdout.strip()
