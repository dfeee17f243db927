"""A few trials of every kind: the quick part of `make test-faults`.

They are spread over a kind's trials, so that they meet each file and each sort of change; a trial that fails here is
repeated with `python -m tests.faults "<kind>" --only <number>`.

Run: pytest tests/faults/test_quick_subset.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.kinds import all_kinds
from tests.faults.runner import Kind, Runner

# What goes past every hash, or costs ranks, is tried less.
FEW = {"malicious state": 3, "malicious files": 30, "fuzzed files": 300, "fuzzed configs": 240, "bit flips": 44}
FEW |= {"power cuts": 60, "resharding": 1, "cuts": 1, "switch": 1, "kill one": 2, "kill all": 2, "kill at points": 2}
FEW |= {"bad disks": 2, "requests to stop": 1, "hangs": 1, "deaths": 2}
USUAL = 30

KINDS = [kind for kind in all_kinds() if not kind.name.startswith("deepspeed: ")]
"""Under a launcher a trial takes half a minute; tests/launch has some of it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the trials share one run."""
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_few_trials_pass(kind: Kind, folder: Path) -> None:
    said: list[str] = []
    count = min(kind.trials, FEW.get(kind.name, USUAL))
    indices = [number * kind.trials // count for number in range(count)]
    assert Runner(folder, say=said.append).run_only([kind], indices), "\n".join(
        line for line in said if not line.endswith("passed")
    )
