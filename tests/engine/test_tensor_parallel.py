"""Tensor ranks under DeepSpeed: what is particular to them, held against one process by the real trainer.

Every layout runs in tests/layouts; here are the initial state to the bit, replicas that stay equal, a norm that counts
each parameter once, held column masks, layers that every tensor rank holds whole, and checkpoints across layouts. The
vocabulary of 515 tokens is padded wherever it is cut.

Run: pytest tests/engine/test_tensor_parallel.py
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slope_dist.config import load_config
from slope_dist.layers import logical_tensors
from slope_dist.parallel.environment import discover
from tests.distributed import run_ranks
from tests.runs import (
    STEPS,
    cut_off,
    distance,
    newest,
    read_all,
    relative,
    same_bits,
    step_rows,
    train,
    watch_engines,
    write_config,
)
from tests.same_run import (
    EXACT,
    assert_same_rows,
    assert_same_run,
    assert_same_run_in_bf16,
    engine_of,
    far,
    maker_of_runs,
)

VOCABULARY = 515

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    make = maker_of_runs(train, corpus, tmp_path_factory, model__vocab_size=VOCABULARY, checkpoint__keep=20)
    return lambda tensor, data, **changes: make(tensor * data, **{"parallel__tensor": tensor} | changes)[0]


def initial_state(path: str) -> list[list[Any]]:
    """The pieces that this rank would save of an engine that was just built."""
    engine, _, _ = engine_of(path, adapters=True)
    fragments, _ = engine.export_state()
    pieces = [
        [f.name, f.kind, list(f.shape), [list(bounds) for bounds in f.rectangle], f.start, f.stop, f.tensor.clone()]
        for f in fragments
        if f.write
    ]
    engine.close()
    return pieces


def assembled(ranks: list[list[list[Any]]]) -> dict[tuple[str, str], Tensor]:
    """Whole tensors by kind and name, each element from exactly one piece."""
    whole: dict[tuple[str, str], Tensor] = {}
    seen: dict[tuple[str, str], Tensor] = {}
    for name, kind, shape, rectangle, start, stop, values in (piece for rank in ranks for piece in rank):
        key = (kind, name)
        place = tuple(slice(*bounds) for bounds in rectangle)
        for store, filled, new in ((whole, values.dtype, values), (seen, torch.int64, torch.ones_like(values))):
            tensor = store.setdefault(key, torch.zeros(shape, dtype=filled))
            flat = tensor[place].reshape(-1).clone()
            flat[start:stop] = new if store is whole else flat[start:stop] + 1
            tensor[place] = flat.view(tensor[place].shape)
    assert all(count.eq(1).all() for count in seen.values())
    return whole


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_the_initial_state_is_that_of_one_process_to_the_bit(precision: str, corpus: Path, tmp_path: Path) -> None:
    def state(name: str, tensor: int, data: int, stage: int) -> dict[tuple[str, str], Tensor]:
        changes = {"model__vocab_size": VOCABULARY, "parallel__tensor": tensor, "parallel__zero_stage": stage}
        changes |= {"precision": precision, "sparsity__column_mask_interval": 4}
        path = write_config(tmp_path / name, corpus, **changes)
        return assembled(run_ranks(initial_state, tensor * data, str(path)))

    expected = state("alone", 1, 1, 0)
    assert {kind for kind, _ in expected} >= {"weight", "metadata", "exp_avg", "exp_avg_sq"}
    for name, (tensor, data, stage) in {"2x2 at 3": (2, 2, 3), "4 at 3": (4, 1, 3), "2 ranks at 3": (1, 2, 3)}.items():
        found = state(name, tensor, data, stage)
        assert found.keys() == expected.keys()
        assert [key for key in expected if not same_bits(found[key], expected[key])] == [], name


@pytest.mark.parametrize(
    ("tensor", "data", "stage", "sequence_parallel"),
    [
        (2, 1, 0, True),
        (4, 1, 1, False),
        (2, 2, 3, True),
        pytest.param(2, 2, 2, True, marks=pytest.mark.slow),
        pytest.param(2, 2, 3, False, marks=pytest.mark.slow),
    ],
)
def test_tensor_ranks_are_the_single_process(
    tensor: int, data: int, stage: int, sequence_parallel: bool, run: Run
) -> None:
    expected = run(1, 1, parallel__zero_stage=0)
    found = run(tensor, data, parallel__zero_stage=stage, parallel__sequence_parallel=sequence_parallel)
    assert_same_run(found, expected)


@pytest.mark.parametrize(
    ("stage", "sequence_parallel"), [(0, False), pytest.param(1, True, marks=pytest.mark.slow), (3, True)]
)
def test_layers_that_every_tensor_rank_holds_whole(stage: int, sequence_parallel: bool, run: Run) -> None:
    # The form of OPT-350M: projections from and to narrower embeddings, in the residual stream.
    form = {"model__embedding_size": 16, "model__norm_position": "post", "sparsity__pattern": "dense"}
    # Wider, that gradients are as large as those of the other form; a seed with which no ReLU is so near to 0 that the
    # order of a sum decides on it.
    form |= {"model__init_std": 0.2, "run__seed": 8}
    expected = run(1, 1, parallel__zero_stage=0, **form)
    found = run(2, 1, parallel__zero_stage=stage, parallel__sequence_parallel=sequence_parallel, **form)
    assert "decoder.project_in.weight.values" in read_all(newest(found), "weight")
    assert_same_run(found, expected)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_held_column_masks_are_those_of_one_process(stage: int, run: Run) -> None:
    expected = run(1, 1, parallel__zero_stage=0, sparsity__column_mask_interval=4)
    found = run(2, 2, parallel__zero_stage=stage, sparsity__column_mask_interval=4)
    assert_same_run(found, expected)
    assert sum(name.endswith("column_mask") for name in read_all(newest(found), "metadata")) == 9


def test_a_kept_transpose_gives_the_gradients_of_a_derived_one(run: Run) -> None:
    kept = run(2, 2, parallel__zero_stage=1, sparsity__backward_weight="resident")
    derived = run(2, 2, parallel__zero_stage=1, sparsity__backward_weight="derived")
    assert_same_rows(step_rows(kept), step_rows(derived), loss=1e-6, norm=1e-6)
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        assert far(read_all(newest(kept), kind), read_all(newest(derived), kind), EXACT) == {}


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_tensor_ranks_are_the_single_process_in_bf16(stage: int, run: Run) -> None:
    expected = run(1, 1, precision="bf16", parallel__zero_stage=1)
    found = run(2, 2, precision="bf16", parallel__zero_stage=stage, parallel__sequence_parallel=stage != 2)
    assert_same_run_in_bf16(found, expected)


@pytest.mark.parametrize(("tensor", "data", "stage"), [(2, 2, 0), (4, 1, 1), (2, 2, 3)])
def test_the_norm_counts_each_parameter_once(tensor: int, data: int, stage: int, run: Run) -> None:
    """Adam's first moments after one step are (1 - beta1) times the gradient, adapters' too."""
    one_step = {"training__steps": 1, "adapters__fraction": 1.0, "training__gradient_clipping": 0.0}
    found = run(tensor, data, parallel__zero_stage=stage, parallel__sequence_parallel=True, **one_step)
    config = load_config(found / "config.json")
    moments = read_all(newest(found), "exp_avg")
    assert sum(".adapter." in name for name in moments) == 2 * 9
    total = torch.stack([moment.double().norm() for moment in moments.values()]).norm()
    [row] = step_rows(found)
    assert relative(row["grad_norm"], float(total) / (1 - config.training.beta1)) <= EXACT
    clipped = run(
        tensor, data, parallel__zero_stage=stage, parallel__sequence_parallel=True,
        **one_step | {"training__gradient_clipping": row["grad_norm"] / 4},
    )  # fmt: skip
    for name, moment in read_all(newest(clipped), "exp_avg").items():
        if not name.endswith("k_proj.bias"):
            assert distance(moment, moments[name] / 4) <= EXACT, name


def replicas(path: str) -> list[Any]:
    """Train; hashes of the state that every tensor rank should have alike, at the end, and this rank's place."""
    from slope_dist.training.trainer import Trainer

    hashes: dict[str, str] = {}

    def watch(event: str, engine: Any, _: Any) -> None:
        if event == "before close":
            shared = {tensor.name for tensor in logical_tensors(engine.module) if not tensor.split}
            for fragment in engine.export_state()[0]:
                if fragment.name in shared:
                    key = f"{fragment.kind} {fragment.name} {fragment.start}"
                    raw = fragment.tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                    hashes[key] = hashlib.sha256(raw).hexdigest()

    watch_engines(watch)
    trainer = Trainer(load_config(path), discover())
    trainer.run()
    return [trainer.groups.position.data, trainer.adapters, hashes]


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "data", "stage"), [(2, 2, 3), (4, 1, 1)])
def test_replicas_are_equal_to_the_bit_after_fifty_steps(
    tensor: int, data: int, stage: int, corpus: Path, tmp_path: Path
) -> None:
    changes = {"training__steps": 50, "adapters__fraction": 0.6, "model__vocab_size": VOCABULARY}
    changes |= {"parallel__tensor": tensor, "parallel__zero_stage": stage, "parallel__sequence_parallel": True}
    results = run_ranks(replicas, tensor * data, str(write_config(tmp_path, corpus, **changes)), timeout=600.0)
    assert all(adapters for _, adapters, _ in results)
    for data_rank in range(data):
        first, *others = [hashes for rank, _, hashes in results if rank == data_rank]
        assert len(others) == tensor - 1
        kinds = {key.rsplit(".", 1)[-1].split()[0] for key in first}
        # Norms, biases of row-split layers, one factor of each adapter.
        assert {"weight", "bias", "down", "up"} <= kinds
        assert all(other == first for other in others)


def kept_up_to(folder: Path, step: int, new: Path) -> Path:
    """A copy of a run folder as it was after `step`; its config is to be written beside it."""
    shutil.copytree(folder, new / "run")
    cut_off(new / "run", step)
    return new


SAVED = {"checkpoint__interval": 2, "checkpoint__keep": 20, "model__vocab_size": VOCABULARY}


@pytest.mark.parametrize(("stage", "step"), [(1, 4), pytest.param(3, 8, marks=pytest.mark.slow)])
def test_a_resume_changes_no_bit(stage: int, step: int, run: Run, corpus: Path, tmp_path: Path) -> None:
    changes = {"parallel__tensor": 2, "parallel__zero_stage": stage, "parallel__sequence_parallel": True} | SAVED
    whole = run(2, 2, **changes)
    again = kept_up_to(whole, step, tmp_path)
    run_ranks(train, 4, str(write_config(again, corpus, **changes)))
    for mine, other in zip(step_rows(again / "run"), step_rows(whole), strict=True):
        assert (mine["loss"], mine["grad_norm"]) == (other["loss"], other["grad_norm"])
    for kind in ("weight", "metadata", "exp_avg", "exp_avg_sq"):
        mine, other = read_all(newest(again / "run"), kind), read_all(newest(whole), kind)
        assert mine.keys() == other.keys()
        assert [name for name in other if not same_bits(mine[name], other[name])] == []


@pytest.mark.slow
def test_a_run_moves_from_tensor_ranks_to_one_process_and_back(run: Run, corpus: Path, tmp_path: Path) -> None:
    layout = {"parallel__tensor": 2, "parallel__zero_stage": 3, "parallel__sequence_parallel": True}
    whole = run(2, 2, **layout | SAVED)
    # The adapters join on the one process.
    alone = kept_up_to(whole, 4, tmp_path / "alone")
    run_ranks(train, 1, str(write_config(alone, corpus, **SAVED | {"parallel__zero_stage": 0})))
    back = kept_up_to(alone / "run", 8, tmp_path / "back")
    run_ranks(train, 4, str(write_config(back, corpus, **layout | SAVED)))
    assert newest(back / "run").step == STEPS
    for folder in (alone, back):
        assert_same_run(folder / "run", whole)
