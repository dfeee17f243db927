"""Every ZeRO stage on two ranks is the single process: losses, gradient norms, weights, masks, samples.

Ten steps of a small OPT with accumulation, active clipping, a warm-up and the adapter switch before step 6, by the real
trainer; weights are read back through the real checkpoint. The single process itself is held against plain torch.

Run: pytest tests/engine/test_deepspeed_engine.py
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slope_dist.config import load_config
from slope_dist.parallel.environment import discover
from tests.distributed import run_ranks
from tests.engine.oracle import plain_run
from tests.runs import (
    FIRST_ADAPTER_STEP,
    SECTIONS,
    STEPS,
    newest,
    read_all,
    step_rows,
    watch_engines,
    write_config,
)

EXACT = 1e-5
"""Relative bound in fp32: ten steps of rounding in another order of summation."""

BF16 = 2.0**-8
"""Relative spacing of bf16: what one rounding of a weight to the other side changes."""

GLOBAL_BATCH = SECTIONS["training"]["global_batch_size"]


def observed_run(config: str) -> dict[str, Any]:
    """Train; returns the samples read, and the places of sharded weights seen after each step."""
    from slope_dist.training.trainer import Trainer

    seen: list[dict[str, Any]] = []

    def watch(event: str, engine: Any, _: Any) -> None:
        if event == "after step" and engine.stage == 3:
            for weight in engine._sparse:
                for tensor in (weight.values, weight.indices):
                    seen.append(
                        {
                            "numel": tensor.data.numel(),
                            "status": tensor.ds_status.name,
                            "shard": tensor.ds_tensor.numel(),
                            "whole": prod(tensor.ds_shape),
                        }
                    )

    watch_engines(watch)
    trainer = Trainer(load_config(config), discover())
    batch = trainer.reader.batch
    samples: list[list[int]] = []

    def recorded(step: int, positions: Any) -> Any:
        made = batch(step, positions)
        samples.append([step, *made.samples.tolist()])
        return made

    trainer.reader.batch = recorded  # type: ignore[method-assign]
    trainer.run()
    return {"samples": samples, "sharded": seen}


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, list[Any]]]:
    """Make a run once for all tests that ask for it; returns its folder and what its ranks saw."""
    made: dict[tuple, tuple[Path, list[Any]]] = {}

    def make(ranks: int, **changes: Any) -> tuple[Path, list[Any]]:
        key = (ranks, *sorted(changes.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("run")
            path = write_config(folder, corpus, **changes)
            made[key] = (folder / "run", run_ranks(observed_run, ranks, str(path)))
        return made[key]

    return make


def relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def distance(a: Tensor, b: Tensor) -> float:
    difference = float((a.double() - b.double()).norm())
    return difference / float(b.double().norm()) if difference else 0.0


def far(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> dict[str, float]:
    """Tensors further than `bound` from what they should be. Key biases are not looked at: see their own test."""
    assert found.keys() == expected.keys()
    distances = {name: distance(found[name], expected[name]) for name in expected if not name.endswith("k_proj.bias")}
    return {name: value for name, value in distances.items() if not value <= bound}


def assert_same_run(found: Path, expected: Path, *, bound: float, weights: str = "weight") -> None:
    for mine, other in zip(step_rows(found), step_rows(expected), strict=True):
        assert (mine["step"], mine["lr"], mine["phase"]) == (other["step"], other["lr"], other["phase"])
        assert relative(mine["loss"], other["loss"]) <= bound, mine
        assert relative(mine["grad_norm"], other["grad_norm"]) <= bound, mine
        assert mine["grad_norm"] > 1.5 * SECTIONS["training"]["gradient_clipping"], "clipping is meant to be active"
    mine, other = newest(found), newest(expected)
    assert far(read_all(mine, weights), read_all(other, weights), bound) == {}
    masks = read_all(other, "metadata")
    assert all(torch.equal(tensor, masks[name]) for name, tensor in read_all(mine, "metadata").items())
    assert read_all(mine, "metadata").keys() == masks.keys()
    assert mine.scalars["optimizer_steps"] == other.scalars["optimizer_steps"]


def test_the_single_process_is_plain_torch(run: Callable, corpus: Path, tmp_path: Path) -> None:
    folder, _ = run(1, parallel__zero_stage=0)
    [plain] = run_ranks(plain_run, 1, str(write_config(tmp_path, corpus)), [])
    rows = step_rows(folder)
    assert [row["phase"] for row in rows] == ["sparse"] * 5 + ["adapters"] * 5
    for row, loss, norm in zip(rows, plain["losses"], plain["norms"], strict=True):
        assert relative(row["loss"], loss) <= EXACT
        assert relative(row["grad_norm"], norm) <= EXACT
    checkpoint = newest(folder)
    found = read_all(checkpoint, "weight") | read_all(checkpoint, "metadata")
    assert far(found, plain["weights"], EXACT) == {}
    assert checkpoint.scalars["optimizer_steps"] == {
        "decay": STEPS,
        "no_decay": STEPS,
        "adapters": STEPS - FIRST_ADAPTER_STEP + 1,
    }


@pytest.mark.parametrize("pattern", ["2:4", "dense"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_are_the_single_process(stage: int, pattern: str, run: Callable) -> None:
    expected, seen_alone = run(1, parallel__zero_stage=0, sparsity__pattern=pattern)
    found, seen = run(2, parallel__zero_stage=stage, sparsity__pattern=pattern)
    assert_same_run(found, expected, bound=EXACT)
    masks = sum(name.endswith("weight.indices") for name in read_all(newest(found), "metadata"))
    assert masks == (12 - 3 if pattern == "2:4" else 0)

    def by_step(ranks: list[Any]) -> dict[int, list[int]]:
        steps: dict[int, list[int]] = {}
        for rank in ranks:
            for step, *samples in rank["samples"]:
                steps.setdefault(step, []).extend(samples)
        return {step: sorted(samples) for step, samples in steps.items()}

    assert by_step(seen) == by_step(seen_alone)
    assert by_step(seen) == {
        step: list(range((step - 1) * GLOBAL_BATCH, step * GLOBAL_BATCH)) for step in range(1, STEPS + 1)
    }


def test_key_biases_get_no_gradient_but_rounding(run: Callable) -> None:
    for ranks, stage in ((1, 0), (2, 3)):
        folder, _ = run(ranks, parallel__zero_stage=stage, sparsity__pattern="2:4")
        moments = read_all(newest(folder), "exp_avg")
        total = torch.stack([tensor.double().norm() for tensor in moments.values()]).norm()
        biases = [tensor.double().norm() for name, tensor in moments.items() if name.endswith("k_proj.bias")]
        assert len(biases) == 2
        assert max(biases) < 1e-6 * total


def test_zero_3_shards_values_and_indices_between_uses(run: Callable) -> None:
    _, ranks = run(2, parallel__zero_stage=3, sparsity__pattern="2:4")
    for seen in ranks:
        # Nine sparse weights of two tensors each, after each of the ten steps.
        assert len(seen["sharded"]) == 9 * 2 * STEPS
        for tensor in seen["sharded"]:
            assert (tensor["numel"], tensor["status"]) == (0, "NOT_AVAILABLE")
            assert tensor["shard"] == tensor["whole"] // 2


def test_zero_3_keeps_small_tensors_whole_where_it_is_told_to(run: Callable) -> None:
    expected, _ = run(1, parallel__zero_stage=0, sparsity__pattern="2:4")
    found, [seen, _] = run(
        2, parallel__zero_stage=3, sparsity__pattern="2:4", parallel__zero3_persistence_threshold=600
    )
    assert_same_run(found, expected, bound=EXACT)
    assert {tensor["status"] for tensor in seen["sharded"]} == {"NOT_AVAILABLE", "AVAILABLE"}


@pytest.mark.parametrize("stage", [1, 3])
def test_recomputed_blocks_change_nothing(stage: int, run: Callable) -> None:
    expected, _ = run(1, parallel__zero_stage=0, sparsity__pattern="2:4")
    found, _ = run(2, parallel__zero_stage=stage, sparsity__pattern="2:4", training__recompute="blocks")
    assert_same_run(found, expected, bound=EXACT)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_are_the_single_process_in_bf16(stage: int, run: Callable) -> None:
    alone, _ = run(1, precision="bf16", parallel__zero_stage=1)
    found, _ = run(2, precision="bf16", parallel__zero_stage=stage)
    assert_same_run(found, alone, bound=BF16, weights="master")
    checkpoint = newest(found)
    weights, masters = read_all(checkpoint, "weight"), read_all(checkpoint, "master")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    # The model's own copy is the rounded master, and nothing else.
    assert all(torch.equal(weights[name], masters[name].bfloat16()) for name in masters)
    fp32, _ = run(1, parallel__zero_stage=0, sparsity__pattern="2:4")
    for mine, other in zip(step_rows(found), step_rows(fp32), strict=True):
        assert relative(mine["loss"], other["loss"]) <= BF16


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_in_the_models_dtype_are_another_rounding_of_the_same_run(stage: int, run: Callable) -> None:
    expected, _ = run(1, precision="bf16", parallel__zero_stage=1)
    found, _ = run(2, precision="bf16", parallel__zero_stage=stage, parallel__gradient_dtype="model")
    for mine, other in zip(step_rows(found), step_rows(expected), strict=True):
        assert relative(mine["loss"], other["loss"]) <= BF16, mine
        assert relative(mine["grad_norm"], other["grad_norm"]) <= 2 * BF16, mine
    masters, others = read_all(newest(found), "master"), read_all(newest(expected), "master")
    assert masters.keys() == others.keys()
    # All together: Adam magnifies the rounding of what has hardly any gradient.
    off = distance(*(torch.cat([group[name].view(-1) for name in others]) for group in (masters, others)))
    assert 0 < off <= BF16, "0 would mean that the setting has no effect"


def test_held_column_masks_are_the_same_on_every_layout(run: Callable) -> None:
    expected, _ = run(1, parallel__zero_stage=0, sparsity__column_mask_interval=4)
    for stage in (1, 3):
        found, _ = run(2, parallel__zero_stage=stage, sparsity__column_mask_interval=4)
        assert_same_run(found, expected, bound=EXACT)
        assert sum(name.endswith("column_mask") for name in read_all(newest(found), "metadata")) == 9
