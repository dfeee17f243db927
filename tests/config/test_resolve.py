"""Ranks, accumulation, tokens, adapter steps and the backward weight follow from the config by plain arithmetic.

Run alone: pytest tests/config/test_resolve.py
"""

import pytest

from slope_dist.config import derive, dump_config, run_folder
from slope_dist.config.resolve import (
    backward_weight_reason,
    fit,
    layout_text,
    threads_per_process,
    without_effect,
    world_size,
    zero_stage,
)
from slope_dist.errors import UserError


def test_derived_values(minimal, load):
    minimal["adapters"] = {"fraction": 0.1, "rank": 16}
    derived = derive(load(minimal), ranks=2)
    assert (derived.world_size, derived.data_ranks, derived.accumulation_steps) == (2, 2, 1)
    assert derived.tokens_per_step == 8 * 32
    assert (derived.adapter_rank, derived.adapter_steps, derived.first_adapter_step) == (16, 10, 91)


def test_without_adapters_the_first_adapter_step_lies_behind_the_run(minimal, load):
    assert derive(load(minimal, ["adapters.rank=0"])).first_adapter_step == 101


@pytest.mark.parametrize(("data", "ranks"), [("null", 1), ("2", 2)])
def test_ranks_of_a_dry_run_come_from_the_config(minimal, load, data, ranks):
    config = load(minimal, [f"parallel.data={data}"])
    assert world_size(config) == ranks
    assert derive(config).accumulation_steps == 2 // ranks


def test_launched_ranks_must_be_those_of_the_config(minimal, load):
    config = load(minimal, ["parallel.data=2"])
    with pytest.raises(UserError, match=r"parallel\.data 2 = 2 ranks, but 1 was launched; launch 2, or set parallel"):
        derive(config, ranks=1)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (1, r"= 4 does not divide the 1 rank launched; launch 4, or change one of them"),
        (2, r"= 4 does not divide the 2 ranks launched; launch 4, or change one of them"),
        (6, r"= 4 does not divide the 6 ranks launched; launch 4 or 8, or change one of them"),
    ],
)
def test_ranks_that_are_no_multiple_of_the_layout(minimal, load, ranks, expected):
    config = load(minimal, ["parallel.tensor=2", "parallel.pipeline=2"])
    with pytest.raises(UserError, match=r"parallel\.tensor 2 x parallel\.pipeline 2 " + expected):
        derive(config, ranks=ranks)


def test_ranks_of_the_config_are_told_by_their_key(minimal, load):
    config = load(minimal, ["parallel.tensor=2", "parallel.gpus=6", "parallel.data=2"])
    with pytest.raises(UserError, match=r"= 4 ranks, but parallel\.gpus is 6; make it 4, or set parallel\.data null"):
        derive(config)
    config = load(minimal, ["parallel.tensor=4", "parallel.gpus=6"])
    with pytest.raises(UserError, match=r"= 4 does not divide parallel\.gpus 6; make it 4 or 8, or change one of them"):
        derive(config)


def test_data_ranks_are_what_the_layout_leaves(minimal, load):
    config = load(minimal, ["parallel.tensor=2", "parallel.pipeline=2"])
    assert (world_size(config), derive(config).data_ranks, derive(config, ranks=8).data_ranks) == (4, 1, 2)
    # Only data ranks divide the batch.
    assert derive(config, ranks=8).accumulation_steps == 1
    asked = load(minimal, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.data=2"])
    assert world_size(asked) == 8
    with pytest.raises(UserError, match=r"parallel\.data 2 = 8 ranks, but 4 were launched; launch 8, or set parallel"):
        derive(asked, ranks=4)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (4, r"micro_batch_size 4 x 4 data ranks = 16; training\.micro_batch_size 2 would fit"),
        (3, r"micro_batch_size 4 x 3 data ranks = 12; set training\.global_batch_size to a multiple of 12"),
        (16, r"micro_batch_size 4 x 16 data ranks = 64; set training\.global_batch_size to a multiple of 64"),
    ],
)
def test_a_batch_that_does_not_come_out_even(minimal, load, ranks, expected):
    with pytest.raises(UserError, match=r"training\.global_batch_size 8 is not a multiple of .*" + expected):
        derive(load(minimal), ranks=ranks)


@pytest.mark.parametrize(
    ("stage", "pattern", "asked", "expected"),
    [
        (0, "2:4", "auto", "resident"),
        (1, "2:4", "auto", "derived"),
        (3, "2:4", "auto", "derived"),
        (0, "2:8", "auto", "derived"),
        (0, "dense", "auto", "derived"),
        (0, "2:4", "derived", "derived"),
        (2, "2:4", "resident", "resident"),
    ],
)
def test_backward_weight(minimal, load, stage, pattern, asked, expected):
    minimal["sparsity"] = {"pattern": pattern, "backward_weight": asked}
    minimal["parallel"] = {"zero_stage": stage}
    minimal["precision"] = "fp32"
    config = load(minimal)
    assert derive(config).backward_weight == expected
    reason = backward_weight_reason(config)
    assert reason.startswith("auto: " if asked == "auto" else "as sparsity.backward_weight says")
    assert (f"ZeRO {stage}" in reason) == (asked == "auto" and pattern == "2:4")


def test_fsdp_keeps_no_transpose_whatever_the_stage_says(minimal, load):
    config = load(minimal, ["parallel.engine=fsdp", "parallel.zero_stage=0", "precision=fp32"])
    assert derive(config).backward_weight == "derived"
    assert backward_weight_reason(config).startswith("auto: fsdp")


@pytest.mark.parametrize(("precision", "runs_as"), [("fp32", 0), ("bf16", 1), ("fp16", 1)])
def test_stage_0_of_narrow_dtypes_is_run_as_stage_1_and_says_so(minimal, load, precision, runs_as):
    minimal["parallel"] = {"zero_stage": 0}
    minimal["precision"] = precision
    config = load(minimal)
    assert zero_stage(config) == runs_as
    assert any("is run as 1" in line for line in without_effect(config)) == (runs_as == 1)
    # A transpose is kept where a rank holds all of the optimizer state, so not at stage 1.
    assert derive(config).backward_weight == ("derived" if runs_as else "resident")


def test_threads(minimal, load):
    assert threads_per_process(load(minimal, ["run.threads=3"]), 2) == 3
    assert threads_per_process(load(minimal), 10**6) == 1
    assert threads_per_process(load(minimal), 1) >= threads_per_process(load(minimal), 2) >= 1
    assert threads_per_process(load(minimal), 1, 1.5) == threads_per_process(load(minimal), 1, 0.2) == 1
    assert threads_per_process(load(minimal), 1, 1e6) == threads_per_process(load(minimal), 1)


def test_run_folder_is_filled_in(minimal, load):
    assert run_folder(load(minimal)) == "runs/run"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("loss_scale.window=5", "loss_scale is used with"),
        (
            "parallel.zero3_persistence_threshold=0",
            "parallel.zero3_persistence_threshold 0 is used at DeepSpeed's ZeRO 3 only; parallel.zero_stage is 1",
        ),
        ("parallel.sequence_parallel=true", "parallel.sequence_parallel changes nothing: parallel.tensor is 1"),
        ("sparsity.pattern=dense", "no adapters are added"),
        (
            "training.warmup_steps=100",
            "the peak learning rate is not reached: training.warmup_steps 100, and 100 steps",
        ),
        ("training.min_learning_rate=1e-4", "training.min_learning_rate 0.0001 is not reached"),
    ],
)
def test_settings_that_change_nothing_are_named(minimal, load, override, expected):
    quiet = load(minimal, ["training.schedule=constant"])
    assert without_effect(quiet) == []
    (line,) = without_effect(load(minimal, ["training.schedule=constant", override]))
    assert line.startswith(expected)


@pytest.mark.parametrize(
    ("setting", "where", "elsewhere", "expected"),
    [
        (
            'sparsity.vendors=["cutlass"]',
            "sparsity.kernels=reference",
            "sparsity.kernels=auto",
            'sparsity.vendors ["cutlass"] changes nothing: sparsity.kernels is "reference"',
        ),
        (
            "parallel.gradient_dtype=model",
            "precision=fp32",
            "precision=bf16",
            'parallel.gradient_dtype "model" changes nothing: precision is "fp32"',
        ),
    ],
)
def test_settings_that_change_nothing_beside_another_are_named(minimal, load, setting, where, elsewhere, expected):
    minimal["training"]["schedule"] = "constant"
    assert without_effect(load(minimal, [where, setting])) == [expected]
    assert without_effect(load(minimal, [where])) == without_effect(load(minimal, [elsewhere, setting])) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        # In bf16 that is none of DeepSpeed's, which would run it as 1.
        ({"zero_stage": 0}, ["parallel.zero_stage 0 is not read"]),
        (
            {"zero_stage": 3, "zero3_persistence_threshold": 0},
            [
                "parallel.zero_stage 3 is not read",
                "parallel.zero3_persistence_threshold 0 is used at DeepSpeed's ZeRO 3 only; parallel.engine is",
            ],
        ),
        ({"gradient_dtype": "model", "tensor": 2, "sequence_parallel": True}, []),
    ],
)
def test_what_fsdp_does_not_read_is_named_once(minimal, load, changes, expected):
    minimal["parallel"] = {"engine": "fsdp", **changes}
    lines = without_effect(load(minimal))
    assert [line.startswith(start) for line, start in zip(lines, expected, strict=True)] == [True] * len(expected)


SHRINKING = {
    "tensor": 2,
    "data": 2,
    "alternatives": [{"data": 1}, {"tensor": 1, "pipeline": 2, "micro_batch_size": 2}, {"tensor": 1, "engine": "fsdp"}],
}


@pytest.mark.parametrize(
    ("ranks", "index", "layout"),
    [
        (4, None, "tensor 2 x pipeline 1 x data 2, deepspeed ZeRO 1, micro-batch 4"),
        (2, 0, "tensor 2 x pipeline 1 x data 1, deepspeed ZeRO 1, micro-batch 4"),
        (8, 1, "tensor 1 x pipeline 2 x data 4, deepspeed ZeRO 1, micro-batch 2"),
        (1, 2, "tensor 1 x pipeline 1 x data 1, fsdp, micro-batch 4"),
    ],
)
def test_the_first_layout_that_fits_is_taken(minimal, load, ranks, index, layout):
    config = load(minimal | {"parallel": SHRINKING})
    taken, line = fit(config, ranks)
    if index is None:
        assert (taken, line) == (config, "")
    else:
        assert line.startswith(f"layout: parallel.alternatives[{index}], {layout}, because parallel.tensor 2 x ")
        assert taken.parallel.alternatives == ()
        # The rest of the run is the same, and what is taken is a run of its own that a file can hold.
        assert taken.model == config.model and load(dump_config(taken)) == taken
        assert taken.training.global_batch_size == config.training.global_batch_size
    derived = derive(taken, ranks)
    assert layout_text(taken, derived.data_ranks) == layout
    assert derived.accumulation_steps * derived.data_ranks * taken.training.micro_batch_size == 8


def test_where_no_layout_fits_all_that_were_tried_are_named(minimal, load):
    config = load(minimal | {"parallel": SHRINKING})
    with pytest.raises(UserError) as caught:
        fit(config, 3)
    first, second = str(caught.value).split("; nor does any of parallel.alternatives fit 3 ranks: ")
    assert first.startswith("parallel.tensor 2 x parallel.pipeline 1 x parallel.data 2 = 4 ranks, but 3 were launched")
    assert [part[:12] for part in second.split("; ")] == ["[0] tensor 2", "[1] tensor 1", "[2] tensor 1"]
    with pytest.raises(UserError, match=r"launch 4, or set parallel\.data null$"):
        fit(load(minimal, ["parallel.tensor=2", "parallel.data=2"]), 3)


def test_an_alternative_that_is_never_taken_is_named(minimal, load):
    minimal["parallel"] = {"alternatives": [{}, {"tensor": 2}, {"tensor": 2, "pipeline": 1}, {"data": 1}]}
    lines = [line for line in without_effect(load(minimal)) if "never taken" in line]
    assert [line.partition(" is")[0] for line in lines] == ["parallel.alternatives[0]", "parallel.alternatives[2]"]
    assert "parallel.alternatives[1] is the same" in lines[1]
