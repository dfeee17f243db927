"""Rule R6: the adapter switch changes nothing else, bit for bit, and leaves nothing of the old engine behind.

A run whose adapters join before step 6 is held against the same run without adapters.

Run: pytest tests/training/test_switch.py
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from slope_dist.config import derive, load_config
from slope_dist.parallel.fragments import MemorySource
from slope_dist.parallel.groups import start as start_groups
from slope_dist.parallel.layout import Layout
from tests.distributed import run_ranks
from tests.runs import (
    FIRST_ADAPTER_STEP,
    VOCAB_SIZE,
    newest,
    read_all,
    same_bits,
    state_of,
    step_rows,
    train,
    watch_engines,
    write_config,
)

LAST_SPARSE_STEP = FIRST_ADAPTER_STEP - 1


def state_around_switch(config: str) -> dict[str, Any]:
    """Train; the state and torch's stream after the last step before the switch, and before the first step after it."""
    seen: dict[str, Any] = {}

    def watch(event: str, engine: Any, detail: Any) -> None:
        if (event, detail) == ("after step", LAST_SPARSE_STEP):
            seen["state"], seen["stream"] = state_of(engine), torch.get_rng_state()
        if (event, detail) == ("before step", FIRST_ADAPTER_STEP):
            seen["later state"], seen["later stream"] = state_of(engine), torch.get_rng_state()

    watch_engines(watch)
    torch.manual_seed(5)
    train(config)
    return seen


@pytest.mark.parametrize(
    ("precision", "ranks", "stage"),
    [
        *(("fp32", 1, stage) for stage in (0, 2)),
        *(pytest.param("fp32", 1, stage, marks=pytest.mark.slow) for stage in (1, 3)),
        *(("fp32", 2, stage) for stage in (1, 3)),
        # Here the masters are not the weights.
        ("bf16", 1, 1),
        pytest.param("bf16", 1, 3, marks=pytest.mark.slow),
    ],
)
def test_switch_changes_nothing_else(precision: str, ranks: int, stage: int, corpus: Path, tmp_path: Path) -> None:
    changes = {"precision": precision, "parallel__zero_stage": stage, "sparsity__column_mask_interval": 4}
    switching, steady = (
        write_config(tmp_path / name, corpus, **changes, adapters__rank=rank) for name, rank in (("a", 8), ("b", 0))
    )
    with_switch = run_ranks(state_around_switch, ranks, str(switching))
    without = run_ranks(state_around_switch, ranks, str(steady))
    for mine, other in zip(with_switch, without, strict=True):
        before, after = other["state"], mine["later state"]
        assert len(before) > 30
        assert [name for name in before if not same_bits(before[name], after[name])] == []
        added = {name.split("/")[1] for name in after.keys() - before.keys()}
        assert all(".adapter." in name or name == "adapters" for name in added)
        assert same_bits(mine["stream"], mine["later stream"])
        new_moments = [t for n, t in after.items() if n.startswith("exp_avg") and ".adapter." in n]
        assert new_moments and not any(tensor.any() for tensor in new_moments)
        assert int(after["steps/adapters"]) == 0
        assert int(after["steps/decay"]) == LAST_SPARSE_STEP
    rows, other_rows = step_rows(tmp_path / "a/run"), step_rows(tmp_path / "b/run")
    # The second factor is zero, so the first loss with adapters is that without, to the last bit.
    for row, other_row in zip(rows[:FIRST_ADAPTER_STEP], other_rows, strict=False):
        assert row["loss"] == other_row["loss"]
    assert rows[FIRST_ADAPTER_STEP - 1]["phase"] == "adapters"
    assert rows[-1]["loss"] != other_rows[-1]["loss"]
    trained = read_all(newest(tmp_path / "a/run"), "weight")
    assert all(tensor.any() for name, tensor in trained.items() if name.endswith("adapter.up"))


def engines_left_after_switch(config: str) -> list[bool]:
    """Train; whether DeepSpeed's engine of the first phase, its optimizer and model live when the second has begun."""
    references: list[list[weakref.ref]] = []
    alive: list[bool] = []

    def watch(event: str, engine: Any, detail: Any) -> None:
        if event == "built":
            references.append([weakref.ref(engine._engine), weakref.ref(engine._adam), weakref.ref(engine.module)])
        if (event, detail) == ("before step", FIRST_ADAPTER_STEP):
            alive.extend(reference() is not None for reference in references[0])

    watch_engines(watch)
    train(config)
    return alive


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_old_engine_is_released(stage: int, corpus: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, corpus, parallel__zero_stage=stage)
    [[engine, adam, model]] = run_ranks(engines_left_after_switch, 1, str(path))
    assert (engine, adam) == (False, False)
    # At stage 3 DeepSpeed's hooks keep the modules, whose parameters are empty by then: the next test weighs them.
    assert stage == 3 or not model


def memory_of_rebuilds(config: str, rebuilds: int) -> list[list[int]]:
    """Bytes of live tensors and live DeepSpeed engines, after each of some rebuilds by way of the switch."""
    from deepspeed.runtime.engine import DeepSpeedEngine as Inner

    from slope_dist.training.build import build_engine

    loaded = load_config(config)
    derived = derive(loaded)
    groups = start_groups(Layout(data=derived.data_ranks))
    engine = build_engine(loaded, derived, groups, adapters=True)
    tokens = torch.arange(2 * 17).view(2, 17) % VOCAB_SIZE
    batches = [(tokens[:, :-1], tokens[:, 1:])] * derived.accumulation_steps
    found = []
    for _ in range(rebuilds):
        engine.train_step(batches)
        fragments, scalars = engine.export_state()
        source = MemorySource.take(fragments, scalars)
        engine.close()
        engine = build_engine(loaded, derived, groups, adapters=True, draw=False)
        engine.load_state(source)
        del source, fragments
        gc.collect()
        storages = [t.untyped_storage() for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
        sizes = {storage._cdata: storage.nbytes() for storage in storages}
        # What is held here while counting would be counted the next time.
        del storages
        found.append([sum(sizes.values()), sum(type(live) is Inner for live in gc.get_objects())])
    engine.close()
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_memory_does_not_grow_over_rebuilds(stage: int, corpus: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, corpus, parallel__zero_stage=stage)
    [found] = run_ranks(memory_of_rebuilds, 1, str(path), 5)
    assert {engines for _, engines in found} == {1}
    assert {size for size, _ in found[1:]} == {found[1][0]}
    assert found[1][0] > 100_000
