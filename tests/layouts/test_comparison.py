"""The layout matrix sees what it is there to see: each kind of deviation, made in a real run's record, is reported.

Run: pytest tests/layouts/test_comparison.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from slope_dist.config.model import ModelConfig
from slope_dist.parallel.layout import Layout
from tests.layouts.cases import BOUNDS, FAMILIES, Case, all_cases, matrix
from tests.layouts.comparison import Run, compare, run_case
from tests.runs import FIRST_ADAPTER_STEP, SECTIONS, STEPS

CASE = Case(Layout(), "zero1")
DENSE = Case(Layout(), "zero1", pattern="dense")


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_case(CASE, tmp_path_factory.mktemp("run"), corpus)


def _scaled_loss(run: Run) -> None:
    run.rows[4]["loss"] *= 1 + 2e-5


def _nan_loss(run: Run) -> None:
    run.rows[0]["loss"] = float("nan")


def _early_norm(run: Run) -> None:
    run.rows[2]["grad_norm"] *= 1 + 2e-4


def _norm(run: Run) -> None:
    run.rows[9]["grad_norm"] *= 1 + 2e-4


def _weight(run: Run) -> None:
    run.weights["decoder.layers.2.fc2.bias"] *= 1 + 2e-5


def _nan_weight(run: Run) -> None:
    run.weights["decoder.embed_tokens.weight"][514, 0] = torch.nan


def _missing_weight(run: Run) -> None:
    del run.weights["decoder.layers.1.fc1.adapter.up"]


def _half_gradient(run: Run) -> None:
    run.gradients["decoder.final_layer_norm.weight"] /= 2


def _adapter_gradient(run: Run) -> None:
    # Its exact first gradient is zero, so that no relative distance can be told.
    run.gradients["decoder.layers.1.fc1.adapter.down"][0, 0] = 1e-9


def _key_bias(run: Run) -> None:
    run.gradients["decoder.layers.1.self_attn.k_proj.bias"][3] = 1e-4


def _mask(run: Run) -> None:
    run.metadata[f"decoder.layers.2.fc1.weight.indices after step {STEPS}"][7, 3] ^= 1


def _no_masks(run: Run) -> None:
    run.metadata.clear()


def _sample(run: Run) -> None:
    run.samples[5][3] = run.samples[6][3]


def _lost_step(run: Run) -> None:
    del run.rows[-1]


def _phase(run: Run) -> None:
    run.rows[5]["phase"] = "sparse"


def _steps_of_adam(run: Run) -> None:
    run.optimizer_steps["adapters"] += 1


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (_scaled_loss, "loss is off by 2.0e-05"),
        (_nan_loss, "loss is off by inf"),
        (_early_norm, "gradient norm is off by 2.0e-04, allowed are 1e-04 before the adapters join"),
        (_norm, "gradient norm is off by 2.0e-04, allowed are 1e-04 after the adapters have joined"),
        (_weight, "weight is off by 2.0e-05, allowed are 1e-05 decoder.layers.2.fc2.bias"),
        (_nan_weight, "weight is off by inf"),
        (_missing_weight, "other weights: ['decoder.layers.1.fc1.adapter.up']"),
        (_half_gradient, "first gradient is off by 5.0e-01, allowed are 1e-05 decoder.final_layer_norm.weight"),
        (_adapter_gradient, "first gradient is off by inf"),
        (_key_bias, "decoder.layers.1.self_attn.k_proj.bias has a gradient in the first step"),
        (_mask, f"the mask decoder.layers.2.fc1.weight.indices after step {STEPS} differs"),
        (_no_masks, "0 masks instead of"),
        (_sample, "other samples were read"),
        (_lost_step, "steps [1, 2, 3, 4, 5, 6, 7, 8, 9]"),
        (_phase, "phase differs"),
        (_steps_of_adam, "optimizer steps"),
    ],
)
def test_a_deviation_is_reported(spoil: Callable[[Run], None], problem: str, run: Run) -> None:
    assert compare(CASE, run, run).problems == []
    spoilt = copy.deepcopy(run)
    spoil(spoilt)
    assert any(problem in line for line in compare(CASE, spoilt, run).problems)


def test_a_run_that_is_another_run_is_reported(run: Run, corpus: Path, tmp_path: Path) -> None:
    rate = SECTIONS["training"]["learning_rate"]
    other = run_case(CASE, tmp_path, corpus, training__learning_rate=rate * 1.001)
    deviation = compare(CASE, other, run)
    assert any(line.startswith("weight is off") for line in deviation.problems)
    assert "lr differs" in deviation.problems


def test_the_record_is_of_the_whole_run(run: Run) -> None:
    """Nothing is equal because it is not there."""
    assert [row["phase"] for row in run.rows] == ["sparse"] * (FIRST_ADAPTER_STEP - 1) + ["adapters"] * (
        STEPS - FIRST_ADAPTER_STEP + 1
    )
    batch = SECTIONS["training"]["global_batch_size"]
    assert [sample[:3] for sample in run.samples] == [
        [step, position, (step - 1) * batch + position] for step in range(1, STEPS + 1) for position in range(batch)
    ]
    # Three blocks of six linears, of which block 0's query, key and value stay dense.
    assert len(run.metadata) == 2 * 15
    assert run.gradients.keys() == run.weights.keys() == run.last_moments.keys()
    assert sum(".adapter." in name for name in run.gradients) == 2 * 15
    assert all(tensor.any() for name, tensor in run.gradients.items() if not name.endswith("adapter.down"))
    assert run.weights["decoder.embed_tokens.weight"].shape == (515, 32)


def test_a_dense_run_has_no_masks(run: Run) -> None:
    problems = compare(DENSE, replace(run, rows=run.rows), run).problems
    assert any("masks instead of" in line for line in problems)


def test_bounds_are_those_that_are_promised() -> None:
    exact = BOUNDS["fp32"]
    assert (exact.loss, exact.norm, exact.weight, exact.gradient) == (1e-5, 1e-4, 1e-5, 1e-5)
    assert exact.later_norm == exact.norm
    assert BOUNDS["bf16"].loss == 1e-3
    assert (BOUNDS["bf16"].norm, BOUNDS["bf16"].later_norm) == (2**-8, 2**-5)
    assert 0.11 < BOUNDS["bf16"].gradient < 0.12


def test_the_matrix_holds_every_legal_combination() -> None:
    cases = [case for case in matrix("opt") if case.precision == "fp32" and case.pattern == "2:4"]
    assert len(cases) == len(set(cases)) == len({case.name for case in cases})
    found = {
        (case.layout.tensor, case.layout.pipeline, case.layout.data, case.engine, case.sequence_parallel)
        for case in [*cases, CASE.control]
    }
    expected = {
        (tensor, pipeline, data, engine, sequence)
        for tensor in (1, 2, 4)
        for pipeline in (1, 2)
        for data in (1, 2, 4)
        for engine in ("zero0", "zero1", "zero2", "zero3", "fsdp")
        for sequence in (False, True)
        if tensor * pipeline * data <= 4
        and not (pipeline > 1 and engine in ("zero2", "zero3", "fsdp"))
        and not (sequence and tensor == 1)
    }
    more = {(2, 2, 2, "zero1", True), (1, 3, 1, "zero0", False), (1, 3, 1, "zero1", False)}
    assert found == expected | more
    dense = {replace(case, pattern="2:4") for case in matrix("opt") if case.pattern == "dense"}
    assert dense == set(cases)
    for family in FAMILIES:
        assert {replace(case, family="opt") for case in matrix(family)} == set(matrix("opt"))
    assert len(all_cases()) == len(FAMILIES) * len(matrix("opt")) and set(FAMILIES) == set(
        get_args(ModelConfig.model_fields["family"].annotation)
    )
