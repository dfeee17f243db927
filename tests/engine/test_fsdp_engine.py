"""The FSDP engine is the same run as one DeepSpeed process: losses, gradient norms, weights, masks, checkpoints.

Ten steps of a small OPT with accumulation, active clipping, a warm-up and the adapter switch before step 6, by the real
trainer, on 1, 2 and 4 ranks, with and without tensor ranks. What a rank holds at any time is weighed in
test_fsdp_memory.py.

Run: pytest tests/engine/test_fsdp_engine.py
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from math import isclose
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slope_dist.checkpoint import Checkpoint
from slope_dist.config import derive, load_config
from slope_dist.errors import UserError
from slope_dist.parallel.fragments import MemorySource
from slope_dist.training.build import check_engine
from tests.distributed import run_ranks
from tests.runs import (
    FIRST_ADAPTER_STEP,
    STEPS,
    cut_off,
    newest,
    read_all,
    same_bits,
    spoilt_run,
    state_of,
    step_rows,
    train,
    write_config,
)
from tests.same_run import (
    BF16,
    EXACT,
    assert_rounded_masters,
    assert_same_rows,
    assert_same_run,
    assert_same_run_in_bf16,
    engine_of,
    maker_of_runs,
    masters_apart,
)
from tests.training.test_switch import LAST_SPARSE_STEP, state_around_switch

FSDP: dict[str, Any] = {"parallel__engine": "fsdp"}
RAGGED: dict[str, Any] = {
    # Over four ranks rows fall into 10 and 18 (cuts within the groups of 4 rows of a column mask), the 18 positions
    # into 5, 5, 5, 3, and the 6 rows of an adapter's first factor into 2, 2, 2, none.
    "model__hidden_size": 40,
    "model__ffn_size": 72,
    "adapters__rank": 6,
    "training__micro_batch_size": 1,
    "sparsity__column_mask_interval": 4,
}


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    make = maker_of_runs(train, corpus, tmp_path_factory)
    return lambda ranks, **changes: make(ranks, **changes)[0]


def alone(run: Callable, **changes: Any) -> Path:
    """The run of one DeepSpeed process."""
    stage = 0 if changes.get("precision", "fp32") == "fp32" else 1
    return run(1, parallel__zero_stage=stage, **changes)


@pytest.mark.parametrize("pattern", ["2:4", "dense"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_data_ranks_are_the_single_process(ranks: int, pattern: str, run: Callable) -> None:
    # On four ranks one sample at a time, so that there is still something to accumulate.
    micro = {"training__micro_batch_size": 1} if ranks == 4 else {}
    found = run(ranks, **FSDP, **micro, sparsity__pattern=pattern)
    assert_same_run(found, alone(run, sparsity__pattern=pattern))
    masks = sum(name.endswith("weight.indices") for name in read_all(newest(found), "metadata"))
    assert masks == (12 - 3 if pattern == "2:4" else 0)


@pytest.mark.parametrize("pattern", ["2:4", pytest.param("dense", marks=pytest.mark.slow)])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("data_ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_tensor_ranks_are_the_single_process(
    data_ranks: int, sequence_parallel: bool, pattern: str, run: Callable
) -> None:
    layout = {"parallel__tensor": 2, "parallel__sequence_parallel": sequence_parallel}
    found = run(2 * data_ranks, **FSDP, **layout, sparsity__pattern=pattern)
    assert_same_run(found, alone(run, sparsity__pattern=pattern))


def test_rows_that_pad_the_vocabulary_belong_to_no_state(run: Callable) -> None:
    # Cut over two tensor ranks, 520 rows are 264 and 256, padded to 264; and 264 over two data ranks are 132 and 132.
    found = run(4, **FSDP, parallel__tensor=2, model__vocab_size=520)
    assert_same_run(found, alone(run, model__vocab_size=520))
    for kind in ("weight", "exp_avg"):
        assert read_all(newest(found), kind)["decoder.embed_tokens.weight"].shape == (520, 32)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, {}),
        (4, {"parallel__tensor": 2, "parallel__sequence_parallel": True}),
    ],
    ids=["data 2", "tensor 2 x data 2, sequence"],
)
def test_recomputed_blocks_change_nothing(ranks: int, changes: dict[str, Any], run: Callable) -> None:
    found = run(ranks, **FSDP, **changes, training__recompute="blocks")
    assert_same_run(found, alone(run, sparsity__pattern="2:4"))


def test_held_column_masks_and_ragged_shards_are_the_single_process(run: Callable) -> None:
    found = run(4, **FSDP, **RAGGED)
    assert_same_run(found, alone(run, **RAGGED))
    assert sum(name.endswith("column_mask") for name in read_all(newest(found), "metadata")) == 9
    held = {"sparsity__column_mask_interval": 4}
    found = run(4, **FSDP, **held, parallel__tensor=2)
    assert_same_run(found, alone(run, **held))


@pytest.mark.parametrize("ranks", [1, 2])
def test_data_ranks_are_the_single_process_in_bf16(ranks: int, run: Callable) -> None:
    expected = alone(run, precision="bf16", sparsity__column_mask_interval=4)
    found = run(ranks, **FSDP, precision="bf16", sparsity__column_mask_interval=4)
    assert_same_run_in_bf16(found, expected)
    assert_rounded_masters(found)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [(2, {"parallel__gradient_dtype": "model"}), (4, {"parallel__tensor": 2})],
    ids=["gradients in bf16", "partial sums in bf16"],
)
def test_sums_in_bf16_are_another_rounding_of_the_same_run(ranks: int, changes: dict[str, Any], run: Callable) -> None:
    expected = run(2, **FSDP, precision="bf16")
    found = run(ranks, **FSDP, precision="bf16", **changes)
    assert_same_rows(step_rows(found), step_rows(expected), loss=BF16, norm=2 * BF16)
    assert 0 < masters_apart(found, expected) <= BF16, "0 would mean that the setting has no effect"


def first_state(config: str) -> dict[str, Tensor]:
    return state_of(engine_of(config)[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_state_is_deepspeeds_to_the_last_bit(precision: str, corpus: Path, tmp_path: Path) -> None:
    stage = 0 if precision == "fp32" else 1
    held = {"sparsity__column_mask_interval": 4, "precision": precision}
    other = write_config(tmp_path / "b", corpus, **held, parallel__zero_stage=stage)
    [mine] = run_ranks(first_state, 1, str(write_config(tmp_path / "a", corpus, **held, **FSDP)))
    [expected] = run_ranks(first_state, 1, str(other))
    assert mine.keys() == expected.keys() and len(mine) > 100
    assert [name for name in expected if not same_bits(mine[name], expected[name])] == []


def gathered_weights(config: str) -> list[dict[str, Any]]:
    """What each sparse weight of the second block looks like while the block is whole, and when it is not."""
    engine, _, _ = engine_of(config)
    block = engine.module.layers[2]
    found = []
    for name in ("q", "k", "v", "out", "up", "down"):
        weight = getattr(block, name).weight
        block.unshard()
        whole = {"values": weight.values.detach().clone(), "indices": weight.indices.clone()}
        block.reshard()
        found.append(whole | {"rows": weight.values.to_local().shape[0]})
    return found


def test_metadata_is_gathered_with_its_values_and_never_cast(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, **FSDP, precision="bf16")
    from slope_dist.training.build import build as build_model
    from slope_dist.training.build import layer_factory

    loaded = load_config(config)
    model: Any = build_model(loaded, layer_factory(loaded, derive(loaded), adapters=False))
    for rank in run_ranks(gathered_weights, 2, str(config)):
        for name, found in zip(("q", "k", "v", "out", "up", "down"), rank, strict=True):
            expected = getattr(model.layers[2], name).weight
            assert same_bits(found["indices"], expected.indices.data)
            assert same_bits(found["values"], expected.values.detach().bfloat16())
            assert found["rows"] == expected.values.shape[0] // 2


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [(2, {}), (2, {"precision": "bf16"}), pytest.param(4, {"parallel__tensor": 2}, marks=pytest.mark.slow)],
    ids=["fp32", "bf16", "tensor 2 x data 2"],
)
def test_the_switch_changes_nothing_else(ranks: int, changes: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    held = {"sparsity__column_mask_interval": 4}
    switching, steady = (
        write_config(tmp_path / name, corpus, **FSDP, **held, **changes, adapters__rank=rank)
        for name, rank in (("a", 8), ("b", 0))
    )
    with_switch = run_ranks(state_around_switch, ranks, str(switching))
    without = run_ranks(state_around_switch, ranks, str(steady))
    for mine, other in zip(with_switch, without, strict=True):
        before, after = other["state"], mine["later state"]
        assert len(before) > 100
        assert [name for name in before if not same_bits(before[name], after[name])] == []
        assert int(after["steps/adapters"]) == 0
        assert int(after["steps/decay"]) == LAST_SPARSE_STEP
    rows, other_rows = step_rows(tmp_path / "a/run"), step_rows(tmp_path / "b/run")
    assert [row["loss"] for row in rows[:FIRST_ADAPTER_STEP]] == [
        row["loss"] for row in other_rows[:FIRST_ADAPTER_STEP]
    ]
    assert rows[-1]["loss"] != other_rows[-1]["loss"]


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, {}),
        pytest.param(4, {**RAGGED, "precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param(4, {"parallel__tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=["fp32", "bf16, held masks, ragged", "tensor 2 x data 2"],
)
def test_a_resumed_run_is_the_whole_one_to_the_last_bit(
    ranks: int, changes: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    changes = {**FSDP, "checkpoint__interval": 3, "checkpoint__keep": 9, **changes}
    path = write_config(tmp_path, corpus, **changes)
    run_ranks(train, ranks, str(path))
    run = tmp_path / "run"
    whole = newest(run).manifest
    rows = [(row["loss"], row["grad_norm"]) for row in step_rows(run)]
    # Before the switch, which is then made again, and after it.
    for step in (3, 6):
        cut_off(run, step)
        run_ranks(train, ranks, str(path))
        assert [(row["loss"], row["grad_norm"]) for row in step_rows(run)] == rows
        again = newest(run).manifest
        assert again.step == STEPS
        assert {name: file.sha256 for name, file in again.files.items()} == {
            name: file.sha256 for name, file in whole.files.items()
        }
        assert again.scalars["optimizer_steps"] == whole.scalars["optimizer_steps"]


def loaded_bits(config: str, checkpoint: str) -> list[str]:
    """Load a checkpoint; the states of this rank that are then not the checkpoint's, bit for bit, and how many are."""
    engine, _, _ = engine_of(config)
    stored = Checkpoint.open(Path(checkpoint))
    engine.load_state(stored)
    fragments, scalars = engine.export_state()
    assert scalars["optimizer_steps"] == stored.scalars["optimizer_steps"]
    wrong, right = [], 0
    for f in fragments:
        expected = stored.read(f.name, f.kind, f.rectangle, f.start, f.stop)
        if same_bits(f.tensor, expected):
            right += 1
        else:
            wrong.append(f"{f.kind} {f.name}")
    return [*wrong, str(right)]


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize("to_fsdp", [True, False], ids=["DeepSpeed to FSDP", "FSDP to DeepSpeed"])
def test_engines_go_on_from_each_others_checkpoints(
    to_fsdp: bool, precision: str, run: Callable, corpus: Path, tmp_path: Path
) -> None:
    common = {"precision": precision, "checkpoint__interval": 4, "checkpoint__keep": 9}
    common |= {"sparsity__column_mask_interval": 4}
    deepspeed = {**common, "parallel__zero_stage": 1}
    fsdp = {**common, **FSDP, "parallel__tensor": 1 if to_fsdp else 2}
    first = run(2, **(deepspeed if to_fsdp else fsdp))
    source = first / "checkpoints" / "step-00000004"
    path = write_config(tmp_path, corpus, **(fsdp if to_fsdp else deepspeed))
    for rank in run_ranks(loaded_bits, 2, str(path), str(source)):
        assert len(rank) == 1 and int(rank[0]) > 50, rank
    shutil.copytree(source, tmp_path / "run" / "checkpoints" / source.name)
    run_ranks(train, 2, str(path))
    rows = step_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(5, STEPS + 1)), "it is meant to have resumed"
    expected = step_rows(alone(run, precision=precision, sparsity__column_mask_interval=4))
    loss, norm = (EXACT, EXACT) if precision == "fp32" else (BF16, 2 * BF16)
    assert_same_rows(rows, expected[4:], loss=loss, norm=norm)


@pytest.mark.parametrize(
    ("how", "ranks", "changes"),
    [
        ("nan gradient", 2, {}),
        ("inf loss", 2, {}),
        pytest.param("inf gradient", 4, {"parallel__tensor": 2, "precision": "bf16"}, marks=pytest.mark.slow),
        ("nan gradient", 4, {**RAGGED, "precision": "bf16", "parallel__gradient_dtype": "model"}),
    ],
)
def test_bad_step_of_one_rank_changes_nothing_anywhere(
    how: str, ranks: int, changes: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    # Step 5 is one that refreshes the masks of the ragged run, before its bad gradients.
    bad = [4, 8]
    path = str(write_config(tmp_path, corpus, **FSDP, **changes))
    for rank in run_ranks(spoilt_run, ranks, path, how, bad):
        assert rank["unchanged"] == bad
    rows = step_rows(tmp_path / "run")
    assert {row["step"]: row["skipped"] for row in rows if "skipped" in row} == dict.fromkeys(bad, "non-finite")
    assert all(row["grad_norm"] is None for row in rows if "skipped" in row)
    assert newest(tmp_path / "run").scalars["optimizer_steps"]["decay"] == STEPS - len(bad)


def spoilt_load(config: str, what: str) -> str:
    """Load a state of which rank 1's part is spoilt; the error."""
    engine, _, _ = engine_of(config)
    fragments, scalars = engine.export_state()
    source = MemorySource.take(fragments, scalars)
    if torch.distributed.get_rank() == 1:
        key = next(key for key in source.pieces if key[0].endswith("fc1.weight.indices"))
        if what == "missing":
            del source.pieces[key]
        else:
            source.pieces[key][0].tensor.zero_()
    try:
        engine.load_state(source)
    except UserError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(("what", "words"), [("missing", "lacks metadata"), ("bad", "holds bad metadata")])
def test_a_bad_piece_on_one_rank_ends_the_load_on_all(what: str, words: str, corpus: Path, tmp_path: Path) -> None:
    first, second = run_ranks(spoilt_load, 2, str(write_config(tmp_path, corpus, **FSDP)), what)
    assert first == second
    assert first.startswith("rank 1: ") and words in first and "fc1.weight.indices" in first


def evaluated(config: str) -> list[float]:
    """Losses of one batch: by evaluation before, between and after two steps, and by the second step itself."""
    engine, _, _ = engine_of(config)
    tokens = torch.arange(2 * 17).view(2, 17) * 7 % 512
    batch = tokens[:, :-1], tokens[:, 1:]
    losses = [float(engine.evaluate(batch))]
    losses.append(engine.train_step([batch]).loss)
    losses.append(float(engine.evaluate(batch)))
    losses.append(engine.train_step([batch]).loss)
    losses.append(float(engine.evaluate(batch)))
    return losses


def test_evaluation_sees_the_values_of_now(corpus: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, corpus, **FSDP)
    for before, first, between, second, after in run_ranks(evaluated, 2, str(path)):
        assert isclose(before, first, rel_tol=1e-6) and isclose(between, second, rel_tol=1e-6)
        assert before > between + 0.01 > after + 0.02


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.12.0a0+nv26.04", "2.13.0"])
def test_a_torch_that_shards_no_integers_is_refused(
    version: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    check_engine(load_config(write_config(tmp_path / "dense", corpus, **FSDP, sparsity__pattern="dense")))
    sparse = load_config(write_config(tmp_path / "sparse", corpus, **FSDP))
    if version.startswith("2.11"):
        with pytest.raises(
            UserError, match=r'torch 2\.11\.0\+cu130 shards no .* torch 2\.12 or later, or .*"deepspeed"'
        ):
            check_engine(sparse)
    else:
        check_engine(sparse)
