"""A pipeline is the single process: losses, gradient norms, weights, masks, samples; with tensor and data ranks too.

Ten steps of a small OPT of three blocks, which two stages cannot share evenly, with accumulation, active clipping, a
warm-up and the adapter switch before step 6, by the real trainer; weights are read back through the real checkpoint.

Run: pytest tests/engine/test_pipeline_engine.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from slope_dist.config import derive, load_config
from slope_dist.data.sampling import IGNORED_LABEL
from slope_dist.layers import NextTokenLoss, logical_tensors
from slope_dist.parallel.layout import Layout
from slope_dist.training.build import build, layer_factory
from tests.distributed import run_ranks
from tests.engine.pipelines import (
    PP2,
    SEQUENCE,
    SMALL,
    TP2,
    assert_same_run,
    assert_same_run_rounded,
    assert_tied,
    batches_of,
    maker_of_runs,
    plain_groups,
)
from tests.runs import (
    FIRST_ADAPTER_STEP,
    FP16,
    STEPS,
    Poison,
    allow_fp16,
    cut_off,
    newest,
    read_all,
    relative,
    state_hash,
    step_rows,
    train,
    watch_engines,
    write_config,
)
from tests.same_run import EXACT, assert_same_samples, engine_of


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, list[Any]]]:
    return maker_of_runs(corpus, tmp_path_factory)


CASES = [
    (Layout(pipeline=2), {"parallel__zero_stage": 0}),
    (Layout(pipeline=2), {"parallel__zero_stage": 1}),
    (Layout(pipeline=3), {"parallel__zero_stage": 1}),
    (Layout(pipeline=2, data=2), {"parallel__zero_stage": 0}),
    (Layout(pipeline=2, tensor=2), {"parallel__zero_stage": 1, **SEQUENCE, "training__recompute": "blocks"}),
    (Layout(pipeline=2, tensor=2, data=2), {"parallel__zero_stage": 1, **SEQUENCE}),
    (Layout(pipeline=2), {"parallel__zero_stage": 1, "sparsity__column_mask_interval": 4}),
]
SLOW_CASES = [
    (Layout(pipeline=2), {"parallel__zero_stage": 1, "sparsity__pattern": "dense"}),
    (Layout(pipeline=2), {"parallel__zero_stage": 0, "training__recompute": "blocks"}),
    (Layout(pipeline=2, data=2), {"parallel__zero_stage": 1}),
    (Layout(pipeline=2, tensor=2), {"parallel__zero_stage": 0}),
    (Layout(pipeline=2, tensor=2), {"parallel__zero_stage": 1}),
    (Layout(pipeline=2, tensor=2), {"parallel__zero_stage": 0, "sparsity__pattern": "dense", **SEQUENCE}),
]


@pytest.mark.parametrize(
    ("layout", "changes"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)], ids=str
)
def test_pipeline_is_the_single_process(layout: Layout, changes: dict[str, Any], run: Callable) -> None:
    shared = {name: value for name, value in changes.items() if name.startswith("sparsity")}
    expected, [alone] = run(1, parallel__zero_stage=0, **shared)
    changes = {"parallel__pipeline": layout.pipeline, "parallel__tensor": layout.tensor, **changes}
    found, ranks = run(layout.world_size, **changes)
    assert_same_run(found, expected)
    assert_same_samples(ranks, layout)
    assert_tied(ranks, layout)
    # The dense first linears are the model's; a stage that begins with a later block has none.
    assert sorted({name for seen in ranks for name in seen["sparse"]}) == alone["sparse"]
    # The switch, which a dense run has none of, moves no layer.
    engines = 1 if changes.get("sparsity__pattern") == "dense" else 2
    for seen in ranks:
        assert seen["parts"] == [seen["expected parts"]] * engines
    if "sparsity__column_mask_interval" in changes:
        assert sum(name.endswith("column_mask") for name in read_all(newest(found), "metadata")) == 15


def test_later_stages_blocks_are_all_sparse(run: Callable) -> None:
    _, [first, last] = run(2, **PP2, parallel__zero_stage=1)
    assert first["parts"][0] == [0, 2, 5]
    assert len(first["sparse"]) == 6 - 3
    assert {f"decoder.layers.1.self_attn.{name}_proj" for name in "qkv"} < set(last["sparse"])
    assert len(last["sparse"]) == 2 * 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "changes"),
    [(Layout(pipeline=2, data=2), {}), (Layout(pipeline=2, tensor=2), SEQUENCE)],
    ids=str,
)
def test_pipeline_is_the_single_process_in_bf16(layout: Layout, changes: dict[str, Any], run: Callable) -> None:
    expected, _ = run(1, precision="bf16", parallel__zero_stage=1)
    sizes = {"parallel__pipeline": layout.pipeline, "parallel__tensor": layout.tensor}
    found, ranks = run(layout.world_size, precision="bf16", parallel__zero_stage=1, **sizes, **changes)
    assert_same_run_rounded(found, expected)
    assert_tied(ranks, layout)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("gradient_dtype", ["fp32", pytest.param("model", marks=pytest.mark.slow)])
def test_narrow_gradients_of_both_tables_are_summed(precision: str, gradient_dtype: str, run: Callable) -> None:
    """DeepSpeed keeps them in another place in each of these cases."""
    changes = {"precision": precision, "parallel__zero_stage": 1, "parallel__gradient_dtype": gradient_dtype}
    changes |= FP16 if precision == "fp16" else {}
    expected, _ = run(1, **changes)
    found, ranks = run(2, **PP2, **changes)
    assert_tied(ranks, Layout(pipeline=2))
    assert_same_run_rounded(found, expected)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"parallel__zero_stage": 0}, marks=pytest.mark.slow),
        {"parallel__zero_stage": 1},
        pytest.param({"precision": "bf16", "parallel__zero_stage": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("dense", [0, 1])
def test_stage_without_a_sparse_layer(dense: int, changes: dict[str, Any], run: Callable) -> None:
    layers = [f"decoder.layers.{block}.*" for block in ([0, 1] if dense == 0 else [1, 2])]
    changes = changes | {"sparsity__dense_layers": layers}
    expected, _ = run(1, **changes)
    found, ranks = run(2, **PP2, **changes)
    assert [bool(seen["sparse"]) for seen in ranks] == [dense != 0, dense == 0]
    (assert_same_run_rounded if "precision" in changes else assert_same_run)(found, expected)
    assert newest(found).scalars["optimizer_steps"]["adapters"] == STEPS - FIRST_ADAPTER_STEP + 1


SAVING = {"checkpoint__interval": 4, "checkpoint__keep": 9}


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        (Layout(pipeline=2), {"parallel__zero_stage": 0}),
        pytest.param(
            Layout(pipeline=2, data=2), {"parallel__zero_stage": 1, "precision": "bf16"}, marks=pytest.mark.slow
        ),
        pytest.param(Layout(pipeline=2, tensor=2), {"parallel__zero_stage": 1, **SEQUENCE}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_resumed_run_is_the_same_to_the_last_bit(
    layout: Layout, changes: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    sizes = {"parallel__pipeline": layout.pipeline, "parallel__tensor": layout.tensor}
    path = write_config(tmp_path, corpus, **SMALL | SAVING | sizes | changes)
    run_ranks(train, layout.world_size, str(path))
    files = {name: file.sha256 for name, file in newest(tmp_path / "run").manifest.files.items()}
    losses = [(row["loss"], row["grad_norm"]) for row in step_rows(tmp_path / "run")]
    # With the switch before it, and without.
    for last in (8, 4):
        cut_off(tmp_path / "run", last)
        run_ranks(train, layout.world_size, str(path))
        assert [(row["loss"], row["grad_norm"]) for row in step_rows(tmp_path / "run")] == losses
        assert {name: file.sha256 for name, file in newest(tmp_path / "run").manifest.files.items()} == files


def test_checkpoints_go_from_the_pipeline_to_one_process_and_back(run: Callable, corpus: Path, tmp_path: Path) -> None:
    expected, _ = run(1, parallel__zero_stage=0)
    config = SMALL | SAVING
    alone = write_config(tmp_path, corpus, **config, parallel__zero_stage=0).rename(tmp_path / "alone.json")
    piped = write_config(tmp_path, corpus, **config, **PP2, parallel__zero_stage=1)
    run_ranks(train, 2, str(piped))
    for last, ranks, path in ((4, 1, alone), (8, 2, piped), (4, 2, piped), (8, 1, alone)):
        cut_off(tmp_path / "run", last)
        run_ranks(train, ranks, str(path))
        assert_same_run(tmp_path / "run", expected)


def spoilt_run(config: str, how: str, spoilt_rank: int) -> dict[str, Any]:
    """Train with steps 4 and 8 spoilt on one rank; which steps left this rank's state as it was."""
    if load_config(config).precision == "fp16":
        allow_fp16()
    unchanged: list[int] = []
    before = ""
    hooks: list[Any] = []

    def watch(event: str, engine: Any, step: Any) -> None:
        nonlocal before
        if event == "before step":
            before = state_hash(engine)
            if step in (4, 8) and dist.get_rank() == spoilt_rank:
                hooks.append(spoil(engine, how))
        if event == "after step":
            while hooks:
                hooks.pop().remove()
            if state_hash(engine) == before:
                unchanged.append(step)

    watch_engines(watch)
    train(config)
    return {"unchanged": unchanged}


def spoil(engine: Any, how: str) -> Any:
    """Make the next micro-batches bad on this rank; returns what undoes it."""
    if how == "nan gradient":
        return engine.module.register_forward_hook(lambda module, arguments, y: Poison.apply(y, torch.nan))

    # The loss alone: its gradients stay finite.
    def infinite(module: nn.Module, arguments: Any, loss: Tensor) -> Tensor | None:
        return loss + torch.inf if isinstance(module, NextTokenLoss) else None

    return torch.nn.modules.module.register_module_forward_hook(infinite)


@pytest.mark.parametrize(
    ("how", "spoilt_rank", "changes"),
    [
        # Ranks 0 and 1 are the first stage's; 2 and 3 the last's.
        ("nan gradient", 1, {"parallel__zero_stage": 0}),
        ("inf loss", 3, {"parallel__zero_stage": 1}),
        pytest.param("nan gradient", 3, {"parallel__zero_stage": 1}, marks=pytest.mark.slow),
        pytest.param("inf loss", 2, {"parallel__zero_stage": 0}, marks=pytest.mark.slow),
        pytest.param("inf loss", 3, {"precision": "bf16"}, marks=pytest.mark.slow),
        ("nan gradient", 0, {"precision": "bf16", "parallel__gradient_dtype": "model"}),
        ("nan gradient", 0, FP16 | {"loss_scale__initial_power": 0}),
    ],
    ids=str,
)
def test_bad_step_of_one_rank_changes_nothing_anywhere(
    how: str, spoilt_rank: int, changes: dict[str, Any], run: Callable, corpus: Path, tmp_path: Path
) -> None:
    path = str(write_config(tmp_path, corpus, **SMALL, **PP2, **changes))
    ranks = run_ranks(spoilt_run, 4, path, how, spoilt_rank)
    assert [rank["unchanged"] for rank in ranks] == [[4, 8]] * 4
    rows = step_rows(tmp_path / "run")
    assert {row["step"]: row["skipped"] for row in rows if "skipped" in row} == {4: "non-finite", 8: "non-finite"}
    assert all(row["grad_norm"] is None for row in rows if "skipped" in row)
    assert all((row["loss"] is None) == (how == "inf loss" and row["step"] in (4, 8)) for row in rows)
    checkpoint = newest(tmp_path / "run")
    assert checkpoint.scalars["skipped_steps"] == 2
    assert checkpoint.scalars["optimizer_steps"]["decay"] == STEPS - 2


def test_overflow_above_the_smallest_scale_is_the_scalers_affair(corpus: Path, tmp_path: Path) -> None:
    path = str(write_config(tmp_path, corpus, **SMALL, **PP2, **FP16))
    ranks = run_ranks(spoilt_run, 2, path, "nan gradient", 0)
    assert [rank["unchanged"] for rank in ranks] == [[4, 8]] * 2
    rows = step_rows(tmp_path / "run")
    assert {row["step"]: row["skipped"] for row in rows if "skipped" in row} == {4: "loss scale", 8: "loss scale"}
    assert newest(tmp_path / "run").scalars["loss_scale"]["cur_scale"] == 2.0


def evaluations(config: str) -> dict[str, Any]:
    """Losses of three batches; of the second, half of the labels are ignored on data rank 0 and all on data rank 1."""
    engine, groups, _ = engine_of(config)
    found = []
    for batch in evaluation_batches(groups.position.data):
        engine.train_step(batches_of(2))
        found.append(float(engine.evaluate(batch)))
    return {"losses": found}


def evaluation_batches(data_rank: int) -> list[tuple[Tensor, Tensor]]:
    batches = batches_of(3, seed=5 + data_rank)
    batches[1][1][: 1 + data_rank] = IGNORED_LABEL
    return batches


@pytest.mark.parametrize("changes", [{}, {**TP2, **SEQUENCE}], ids=str)
def test_evaluation_is_each_replicas_own(changes: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    layout = Layout(tensor=changes.get("parallel__tensor", 1), data=2, pipeline=2)
    path = write_config(tmp_path, corpus, **SMALL, **PP2, **changes, parallel__zero_stage=0)
    ranks = run_ranks(evaluations, layout.world_size, str(path))
    # The first batch is evaluated after one step: held against the model in plain torch.
    config = load_config(str(path))
    model = build(config, layer_factory(config, derive(config, 4), adapters=False))
    step = torch.optim.AdamW(plain_groups(list(logical_tensors(model))), lr=0.01, betas=(0.9, 0.95), eps=1e-5)
    for tokens, wanted in batches_of(2):
        (model(tokens, wanted) / 2).backward()
    nn.utils.clip_grad_norm_(model.parameters(), config.training.gradient_clipping)
    step.step()
    for rank, seen in enumerate(ranks):
        data = layout.position(rank).data
        assert math.isnan(seen["losses"][1]) == (data == 1)
        expected = model(*evaluation_batches(data)[0]).item()
        assert relative(seen["losses"][0], expected) <= EXACT
        assert seen["losses"][2] == ranks[layout.tensor * data]["losses"][2]
