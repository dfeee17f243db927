"""A stage recomputes its blocks alone, ties its table alone, prints nothing and leaves nothing behind.

Run: pytest tests/engine/test_pipeline_module.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from slope_dist.config import deepspeed_dict, derive, load_config
from slope_dist.engine.optimizer import OptimizerSettings
from slope_dist.layers import NextTokenLoss, logical_tensors
from slope_dist.models import family
from slope_dist.parallel.fragments import MemorySource
from slope_dist.parallel.groups import start as start_groups
from slope_dist.parallel.layout import Layout
from slope_dist.planning.shapes import shape_of
from slope_dist.sparse import SparseWeight
from slope_dist.training.build import layer_factory
from tests.distributed import end_ranks, run_ranks
from tests.engine.pipelines import (
    EXACT,
    NORM,
    PP2,
    SEQUENCE,
    SMALL,
    TABLE,
    TP2,
    assert_same_run,
    assert_tied,
    batches_of,
    engine_of,
    far,
    maker_of_runs,
    plain_groups,
    relative,
)
from tests.runs import (
    step_rows,
    write_config,
)


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, list[Any]]]:
    return maker_of_runs(corpus, tmp_path_factory)


def test_recomputing_blocks_changes_no_bit(run: Callable) -> None:
    kept, _ = run(2, **PP2, parallel__zero_stage=0)
    again, _ = run(2, **PP2, parallel__zero_stage=0, training__recompute="blocks")
    assert [row["loss"] for row in step_rows(again)] == [row["loss"] for row in step_rows(kept)]


def forwards_of_a_step(config: str) -> dict[str, int]:
    """Train a step; how often layers of each kind ran forwards on this rank."""
    engine, _, _ = engine_of(config)
    counts: dict[str, int] = {}
    for layer in engine.module.forward_funcs:
        name = type(layer).__name__
        layer.register_forward_pre_hook(lambda *_, name=name: counts.update({name: counts.get(name, 0) + 1}))
    engine.train_step(batches_of(4))
    return counts


@pytest.mark.parametrize(("recompute", "times"), [("none", 1), ("blocks", 2)])
def test_only_blocks_are_recomputed(recompute: str, times: int, corpus: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, corpus, **SMALL, **PP2, training__recompute=recompute)
    first, last = run_ranks(forwards_of_a_step, 2, str(path))
    assert first == {"OPTEmbedding": 4, "OPTBlock": 4 * times}
    assert last == {"OPTBlock": 2 * 4 * times, "OPTHead": 4}


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_tied_tables_stay_equal_with_many_data_ranks(stage: int, run: Callable) -> None:
    """Sums of more than two terms depend on their order."""
    changes = {"training__global_batch_size": 16, "parallel__zero_stage": stage}
    expected, _ = run(1, **changes)
    found, ranks = run(8, **PP2, **changes)
    assert_tied(ranks, Layout(pipeline=2, data=4))
    assert_same_run(found, expected)


def test_switch_leaves_no_process_group_and_no_engine_behind(run: Callable) -> None:
    _, ranks = run(8, **PP2, **TP2, **SEQUENCE, parallel__zero_stage=1)
    for seen in ranks:
        before, after = seen["process groups"]
        assert after == before + 1, "the one that saves use, made after the first engine"
        assert seen["alive after the switch"] == [False] * 3


def build_and_say_nothing(config: str) -> None:
    """Build an engine, train a step, evaluate."""
    engine, _, _ = engine_of(config)
    engine.train_step(batches_of(4))
    engine.evaluate(batches_of(1)[0])
    engine.close()


def test_nothing_is_printed(corpus: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, corpus, **SMALL, **PP2)
    for outcome in end_ranks(build_and_say_nothing, 2, str(path)):
        assert (outcome.code, outcome.output, outcome.errors) == (0, "", "")


class UntiedHead(nn.Module):
    """A head with a table of its own."""

    def __init__(self, make: Any, shape: Any) -> None:
        super().__init__()
        self.norm = make.layer_norm("final_norm", shape.hidden_size)
        self.logits = make.linear("lm_head", shape.hidden_size, shape.vocab_size, split="whole", std=0.02, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.logits(self.norm(hidden))


def untied_run(config: str) -> dict[str, Any]:
    """Three steps of a model whose head has its own table; the same in plain torch on this rank."""
    from slope_dist.engine.pipeline_engine import PipelineEngine

    loaded = load_config(config)
    derived = derive(loaded, dist.get_world_size())
    groups = start_groups(Layout(1, derived.data_ranks, 2))
    shape = shape_of(loaded.model)

    def builders() -> list[Callable[[], nn.Module]]:
        make = layer_factory(loaded, derived, adapters=False)
        make.dense_layers["lm_head"] = "the head"
        return [*family("opt").layers(make, shape)[:-1], lambda: UntiedHead(make, shape)]

    numbers = OptimizerSettings((0.9, 0.95), 1e-5, 0.1, 0.1, 0.5)
    settings = deepspeed_dict(loaded, micro_batch_size=2, accumulation_steps=4, data_ranks=derived.data_ranks)
    engine = PipelineEngine(
        builders(), NextTokenLoss(), [0, 3, 5], groups, settings, numbers, column_mask_interval=1, recompute=False
    )
    engine.set_learning_rates({"base": 0.01})
    model = nn.Sequential(*(builder() for builder in builders()))
    optimizer = torch.optim.AdamW(plain_groups(list(logical_tensors(model))), lr=0.01, betas=(0.9, 0.95), eps=1e-5)
    rows = []
    for step in range(3):
        result = engine.train_step(batches_of(4, seed=step))
        losses = [NextTokenLoss()(model(tokens), labels) / 4 for tokens, labels in batches_of(4, seed=step)]
        sum(losses).backward()  # type: ignore[union-attr]
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        for weight in model.modules():
            if isinstance(weight, SparseWeight):
                weight.values_changed()
        rows.append([result.loss, float(sum(losses)), result.grad_norm, float(norm)])
    source = MemorySource.take(*engine.export_state())
    expected = {tensor.name: tensor.tensor.detach() for tensor in logical_tensors(model)}
    held = {name for name, kind in source.pieces if kind == "weight"}
    found = {name: torch.cat([piece.tensor for piece in source.pieces[name, "weight"]]) for name in held}
    return {"rows": rows, "found": found, "expected": {name: expected[name].flatten() for name in held}}


@pytest.mark.parametrize("stage", [0, 1])
def test_head_with_its_own_table(stage: int, corpus: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, corpus, **SMALL, **PP2, parallel__zero_stage=stage)
    first, last = run_ranks(untied_run, 2, str(path))
    assert first["rows"] == last["rows"]
    for loss, expected_loss, norm, expected_norm in first["rows"]:
        assert relative(loss, expected_loss) <= EXACT
        assert relative(norm, expected_norm) <= NORM
    assert TABLE in first["found"] and TABLE not in last["found"] and "lm_head.weight.values" in last["found"]
    for seen in (first, last):
        assert far(seen["found"], seen["expected"], EXACT) == {}
