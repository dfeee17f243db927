"""Claim: real runs go on from a model that came back: with its loss, in every layout, with adapters from step 1, and
over an interruption; what they save then is the same state.

Run: pytest tests/training/test_beginning_runs.py
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slope_dist.checkpoint.inspection import hash_of_all, logical_hashes
from slope_dist.config import load_config
from slope_dist.data.load_tokenizer import load_tokenizer
from slope_dist.export import open_model
from slope_dist.training.beginning import begin_from
from tests.distributed import run_ranks
from tests.export.models import random_stored
from tests.programs import program
from tests.runs import (
    VOCAB_SIZE,
    cut_off,
    evaluation_rows,
    newest,
    read_all,
    relative,
    same_bits,
    step_rows,
    train,
    write_config,
)

NO_ADAPTERS: dict[str, Any] = {"adapters__rank": 0, "evaluation__interval": 4, "checkpoint__keep": 9}
# The second takes the first's weights at a rate at which nothing is forgotten in a few steps.
SECOND: dict[str, Any] = NO_ADAPTERS | {"run__seed": 8, "training__steps": 6, "training__warmup_steps": 0}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ZeRO 1": {},
    "FSDP2": {"parallel__engine": "fsdp"},
    "ZeRO 3": {"parallel__zero_stage": 3},
    "tensor": {"parallel__tensor": 2},
    "pipeline": {"parallel__pipeline": 2},
}
QUICK = ("ZeRO 1", "FSDP2")


@pytest.fixture(scope="module")
def exported(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its last weights in Hugging Face's form."""
    target = tmp_path_factory.mktemp("exported") / "hf"
    assert convert(str(first), "--to", "hf", "--output", str(target)) == 0
    return target


@pytest.fixture(scope="module")
def first(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that ended."""
    folder = tmp_path_factory.mktemp("first")
    run_ranks(train, 1, str(write_config(folder, corpus, **NO_ADAPTERS)))
    return folder / "run"


def convert(*arguments: str) -> int:
    return program("convert_checkpoint").main(list(arguments))


def begin(source: Path, folder: Path, corpus: Path, **changes: Any) -> str:
    """Make a model step 0 of a run; returns that one's config."""
    path = str(write_config(folder, corpus, **changes))
    assert convert(str(source), "--from", "hf", "--to", "slope-checkpoint", "--config", path) == 0
    return path


@pytest.fixture(scope="module")
def second(exported: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that went on from the first's weights, on one rank."""
    folder = tmp_path_factory.mktemp("second")
    run_ranks(train, 1, begin(exported, folder, corpus, **SECOND, checkpoint__interval=2))
    return folder / "run"


def test_a_run_goes_on_with_the_loss_of_the_model_and_learns(first: Path, second: Path) -> None:
    ended, (began, *_, last) = evaluation_rows(first)[-1], evaluation_rows(second)
    assert began["step"] == 0 and relative(began["eval_loss"], ended["eval_loss"]) <= 1e-6
    assert last["step"] == 6 and last["eval_loss"] < began["eval_loss"] - 0.01
    losses = [row["loss"] for row in step_rows(second)]
    assert [row["step"] for row in step_rows(second)] == list(range(1, 7)) and losses[-1] < step_rows(first)[0]["loss"]


def test_step_0_is_stored_as_a_run_stores_its_steps(second: Path) -> None:
    begun = open_model(second / "checkpoints" / "step-00000000")
    later = newest(second)
    manifests = [checkpoint.manifest for checkpoint in (begun._checkpoint, later)]  # type: ignore[attr-defined]
    shapes = [{key: (tensor.shape, tensor.dtype) for key, tensor in of.tensors.items()} for of in manifests]
    assert shapes[0] == shapes[1]
    assert manifests[0].scalars.keys() == manifests[1].scalars.keys()
    assert manifests[0].identity == manifests[1].identity and manifests[0].config == manifests[1].config
    for kind in ("exp_avg", "exp_avg_sq"):
        assert not any(moment.count_nonzero() for moment in read_all(begun._checkpoint, kind).values())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYOUTS]
)
def test_it_is_the_same_run_in_every_layout(
    layout: str, exported: Path, second: Path, corpus: Path, tmp_path: Path
) -> None:
    run_ranks(train, 2, begin(exported, tmp_path, corpus, **SECOND, **LAYOUTS[layout]))
    rows, expected = step_rows(tmp_path / "run"), step_rows(second)
    assert len(rows) == len(expected) == 6
    for mine, other in zip(rows, expected, strict=True):
        assert relative(mine["loss"], other["loss"]) <= 1e-5, mine["step"]


def masks_of(run: Path) -> dict[str, Tensor]:
    return read_all(newest(run), "metadata")


def test_adapters_from_the_first_step_leave_the_masks_alone(
    first: Path, exported: Path, corpus: Path, tmp_path: Path
) -> None:
    changes = SECOND | {"adapters__rank": 8, "adapters__fraction": 1.0, "checkpoint__interval": 3}
    path = begin(exported, tmp_path / "whole", corpus, **changes)
    begun = masks_of(tmp_path / "whole" / "run")
    run_ranks(train, 1, path)
    run = tmp_path / "whole" / "run"
    rows = step_rows(run)
    assert [row["phase"] for row in rows] == ["adapters"] * 6 and "switch_seconds" in rows[0]
    masks = masks_of(run)
    assert masks.keys() == begun.keys() and all(torch.equal(masks[name], begun[name]) for name in masks)
    weights, before = read_all(newest(run), "weight"), read_all(newest(first), "weight")
    trained = [name for name in weights if name.endswith(".adapter.up")]
    assert len(trained) == len(masks) and all(weights[name].count_nonzero() for name in trained)
    assert not any(torch.equal(weights[name], before[name]) for name in before if name.endswith(".weight.values"))
    # Killed after step 3 it comes to the same end.
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    cut_off(tmp_path / "cut" / "run", 3)
    run_ranks(train, 1, str(write_config(tmp_path / "cut", corpus, **changes)))
    ends = [hash_of_all(logical_hashes(newest(tmp_path / name / "run"))) for name in ("whole", "cut")]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_a_bf16_run_takes_the_fp32_numbers_of_its_source(engine: str, corpus: Path, tmp_path: Path) -> None:
    stored = random_stored("llama", vocab_size=VOCAB_SIZE, pattern=None, tokenizer=load_tokenizer(corpus))
    # Nothing moves in this step, so what it saves is what it has loaded.
    path = str(
        write_config(
            tmp_path,
            corpus,
            model=stored.model.model_dump(mode="json"),
            adapters__rank=0,
            precision="bf16",
            parallel__engine=engine,
            training__steps=1,
            training__learning_rate=1e-30,
            training__min_learning_rate=0,
            training__weight_decay=0,
        )
    )
    begin_from(stored, load_config(path))
    begun = newest(tmp_path / "run")
    run_ranks(train, 1, path)
    ended = newest(tmp_path / "run")
    assert (begun.step, ended.step) == (0, 1)
    before, after = read_all(begun, "master"), read_all(ended, "master")
    assert before.keys() == after.keys()
    for name, master in before.items():
        assert same_bits(after[name], master), name
    assert same_bits(
        before["model.layers.0.self_attn.q_proj.weight.values"], stored.dense("model.layers.0.self_attn.q_proj")
    )
