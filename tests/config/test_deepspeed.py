"""DeepSpeed's own config classes accept the derived dictionary and read from it what the run's config says.

Run alone: pytest tests/config/test_deepspeed.py
"""

import copy
import importlib
from pathlib import Path

import pytest
import torch

from slope_dist.config import deepspeed_dict, load_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.json"))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def parsed(settings):
    from deepspeed.runtime.config import DeepSpeedConfig

    return DeepSpeedConfig(copy.deepcopy(settings))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_accepted(path):
    config = load_config(path)
    settings = deepspeed_dict(config, micro_batch_size=2, accumulation_steps=3, data_ranks=1)
    theirs = parsed(settings)
    assert (theirs.train_batch_size, theirs.gradient_accumulation_steps) == (6, 3)
    assert theirs.zero_optimization_stage == config.parallel.zero_stage


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("gradient_dtype", ["fp32", "model"])
def test_what_deepspeed_reads(minimal, load, precision, stage, gradient_dtype):
    minimal |= {
        "precision": precision,
        "parallel": {"zero_stage": stage, "gradient_dtype": gradient_dtype, "zero3_persistence_threshold": 7},
        "loss_scale": {"initial_power": 9, "window": 11, "minimum": 4},
    }
    minimal["training"]["gradient_clipping"] = 0.25
    settings = deepspeed_dict(load(minimal), micro_batch_size=4, accumulation_steps=2, data_ranks=1)
    theirs = parsed(settings)

    from deepspeed.runtime.config import DtypeEnum

    expected = torch.float32 if gradient_dtype == "fp32" else DTYPES[precision]
    assert DtypeEnum(theirs.grad_accum_dtype).value == expected
    assert theirs.communication_data_type == expected
    assert theirs.gradient_clipping == 0.25
    assert theirs.zero_allow_untested_optimizer
    assert not theirs.wall_clock_breakdown and not theirs.timers_config.enabled
    assert theirs.steps_per_print > 10**9

    assert theirs.bfloat16_config.enabled == (precision == "bf16")
    assert theirs.float16_config.enabled == (precision == "fp16")
    assert theirs.float16_config.loss_scale == 0
    scaler = theirs.float16_config.dynamic_loss_scale_args()
    assert (scaler["init_scale"], scaler["scale_window"], scaler["min_scale"]) == (2**9, 11, 4)
    assert scaler["delayed_shift"] == 1

    zero = theirs.zero_config
    # Stage 0 of the narrow dtypes is run as stage 1: see resolve.zero_stage.
    assert (zero.stage, zero.overlap_comm) == (stage or int(precision != "fp32"), False)
    assert (zero.param_persistence_threshold, zero.max_reuse_distance) == (7, 0)
    assert zero.contiguous_gradients
    assert zero.offload_optimizer is None and zero.offload_param is None


def test_no_clipping_is_written_as_zero(minimal, load):
    config = load(minimal, ["training.gradient_clipping=0"])
    settings = deepspeed_dict(config, micro_batch_size=4, accumulation_steps=2, data_ranks=1)
    assert parsed(settings).gradient_clipping == 0.0


def test_batch_covers_all_data_ranks_and_overlap_is_a_choice(minimal, load):
    settings = deepspeed_dict(
        load(minimal), micro_batch_size=2, accumulation_steps=2, data_ranks=2, overlap_communication=True
    )
    assert settings["train_batch_size"] == 8
    assert settings["zero_optimization"]["overlap_comm"] is True


def test_every_key_is_one_deepspeed_knows(minimal, load):
    """DeepSpeed ignores an unknown top-level key silently, so each must be a constant of its own."""
    import deepspeed.runtime.config as theirs

    known = {value for name in ("constants", "precision_config", "zero.config") for value in constants_of(name)}
    known |= {value for value in vars(theirs).values() if isinstance(value, str)}
    known.add(importlib.import_module("deepspeed.utils.config").TIMERS)
    settings = deepspeed_dict(load(minimal), micro_batch_size=4, accumulation_steps=2, data_ranks=1)
    assert set(settings) <= known


def constants_of(module):
    found = vars(importlib.import_module(f"deepspeed.runtime.{module}"))
    return [value for name, value in found.items() if name.isupper() and isinstance(value, str)]


def test_zero3_holds_at_most_two_blocks_unsharded(minimal, load):
    kept_of_a_block = (4 * 64 * 64 + 2 * 64 * 256) // 2
    # Elements that one rank holds: of a block cut over two tensor ranks, half.
    for tensor in (1, 2):
        config = load(minimal, ["parallel.zero_stage=3", f"parallel.tensor={tensor}"])
        zero = deepspeed_dict(config, micro_batch_size=4, accumulation_steps=2, data_ranks=1)["zero_optimization"]
        assert 0 < zero["stage3_max_live_parameters"] <= 2 * kept_of_a_block // tensor
        assert 0 < zero["stage3_prefetch_bucket_size"] <= kept_of_a_block // tensor
