"""Claim: a message names the newest checkpoint that looks complete, and decodes no manifest to name one that the
process knows.

Run alone: python -m pytest tests/training/test_folder.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from slope_dist.checkpoint import reader
from slope_dist.config import load_config
from slope_dist.training.folder import RunFolder
from tests.checkpoint.states import save_state
from tests.runs import write_config


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(load_config(write_config(tmp_path, tmp_path)))
    for step in (1, 2):
        save_state(made.checkpoints, step)
    return made


def spoil(path: Path) -> None:
    victim = sorted(path.glob("rank*"))[0]
    os.truncate(victim, victim.stat().st_size - 1)


def test_the_newest_that_looks_complete_is_named(folder: RunFolder) -> None:
    first, second = (folder.checkpoints / f"step-0000000{step}" for step in (1, 2))
    assert folder.newest_complete(None) == folder.newest_complete(first) == second
    spoil(second)
    assert folder.newest_complete(None) == folder.newest_complete(first) == first
    (first / "manifest.json").unlink()
    assert folder.newest_complete(first) is None


def test_what_is_known_is_not_decoded(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(*_: Any) -> Any:
        raise AssertionError("a manifest was decoded")

    monkeypatch.setattr(reader, "decode", decoded)
    second = folder.checkpoints / "step-00000002"
    assert folder.newest_complete(second) == second
    with pytest.raises(AssertionError):
        folder.newest_complete(None)
