"""A handful of layouts, the most telling ones, are the single process: the quick part of `make test-layouts`.

Ten steps with accumulation, active clipping and the adapter switch before step 6, by the real trainer and read back
through the real checkpoints: losses, gradient norms, every logical weight, every parameter's first gradient, forward
masks and samples. What is compared how is in comparison.py, how closely in cases.py.

Run: pytest tests/layouts/test_quick_subset.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.layouts.cases import QUICK, Case, all_cases
from tests.layouts.comparison import Run, compare, run_case


@pytest.fixture(scope="module")
def control(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Run]:
    """The single process a case is held against, run once."""
    made: dict[Case, Run] = {}

    def make(case: Case) -> Run:
        if case.control not in made:
            made[case.control] = run_case(case.control, tmp_path_factory.mktemp("control"), corpus)
        return made[case.control]

    return make


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_a_layout_is_the_single_process(
    case: Case, control: Callable[[Case], Run], corpus: Path, tmp_path: Path
) -> None:
    expected = control(case)
    assert compare(case, run_case(case, tmp_path, corpus), expected).problems == []


def test_the_quick_subset_is_part_of_the_matrix() -> None:
    assert set(QUICK) <= set(all_cases())
