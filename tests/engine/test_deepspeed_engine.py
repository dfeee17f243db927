"""Every ZeRO stage on two ranks is the single process: losses, gradient norms, weights, masks, samples.

Ten steps of a small OPT with accumulation, active clipping, a warm-up and the adapter switch before step 6, by the real
trainer; weights are read back through the real checkpoint. The single process itself is held against plain torch.

Run: pytest tests/engine/test_deepspeed_engine.py
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, prod
from pathlib import Path
from typing import Any

import pytest
import torch

from slope_dist.config import load_config
from slope_dist.parallel.environment import discover
from slope_dist.parallel.layout import Layout
from tests.distributed import run_ranks
from tests.engine.oracle import plain_run
from tests.runs import (
    FIRST_ADAPTER_STEP,
    STEPS,
    newest,
    read_all,
    relative,
    samples_of,
    step_rows,
    watch_engines,
    write_config,
)
from tests.same_run import (
    BF16,
    EXACT,
    assert_rounded_masters,
    assert_same_rows,
    assert_same_run,
    assert_same_run_in_bf16,
    assert_same_samples,
    far,
    maker_of_runs,
    masters_apart,
)


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
    samples = samples_of(trainer)
    trainer.run()
    return {"samples": samples, "sharded": seen}


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, list[Any]]]:
    return maker_of_runs(observed_run, corpus, tmp_path_factory)


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


@pytest.mark.parametrize("pattern", ["2:4", pytest.param("dense", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_are_the_single_process(stage: int, pattern: str, run: Callable) -> None:
    expected, seen_alone = run(1, parallel__zero_stage=0, sparsity__pattern=pattern)
    found, seen = run(2, parallel__zero_stage=stage, sparsity__pattern=pattern)
    assert_same_run(found, expected)
    masks = sum(name.endswith("weight.indices") for name in read_all(newest(found), "metadata"))
    assert masks == (12 - 3 if pattern == "2:4" else 0)

    assert_same_samples(seen_alone, Layout())
    assert_same_samples(seen, Layout(data=2))


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
    assert_same_run(found, expected)
    assert {tensor["status"] for tensor in seen["sharded"]} == {"NOT_AVAILABLE", "AVAILABLE"}


@pytest.mark.parametrize("stage", [1, 3])
def test_recomputed_blocks_change_nothing(stage: int, run: Callable) -> None:
    expected, _ = run(1, parallel__zero_stage=0, sparsity__pattern="2:4")
    found, _ = run(2, parallel__zero_stage=stage, sparsity__pattern="2:4", training__recompute="blocks")
    assert_same_run(found, expected)


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1, 2, 3])
def test_two_ranks_are_the_single_process_in_bf16(stage: int, run: Callable) -> None:
    alone, _ = run(1, precision="bf16", parallel__zero_stage=1)
    found, _ = run(2, precision="bf16", parallel__zero_stage=stage)
    assert_same_run_in_bf16(found, alone)
    assert_rounded_masters(found)
    fp32, _ = run(1, parallel__zero_stage=0, sparsity__pattern="2:4")
    assert_same_rows(step_rows(found), step_rows(fp32), loss=BF16, norm=inf)


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_in_the_models_dtype_are_another_rounding_of_the_same_run(stage: int, run: Callable) -> None:
    expected, _ = run(1, precision="bf16", parallel__zero_stage=1)
    found, _ = run(2, precision="bf16", parallel__zero_stage=stage, parallel__gradient_dtype="model")
    assert_same_rows(step_rows(found), step_rows(expected), loss=BF16, norm=2 * BF16)
    assert 0 < masters_apart(found, expected) <= BF16, "0 would mean that the setting has no effect"


def test_held_column_masks_are_the_same_on_every_layout(run: Callable) -> None:
    expected, _ = run(1, parallel__zero_stage=0, sparsity__column_mask_interval=4)
    for stage in (1, 3):
        found, _ = run(2, parallel__zero_stage=stage, sparsity__column_mask_interval=4)
        assert_same_run(found, expected)
        assert sum(name.endswith("column_mask") for name in read_all(newest(found), "metadata")) == 9
