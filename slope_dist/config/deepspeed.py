"""DeepSpeed's own dictionary, derived from a config and never written by hand.

Every value that decides numbers or memory is written out, because DeepSpeed 0.19's defaults are not neutral: where a
key is absent it clips gradients at 1.0, accumulates and reduces them in the model's dtype, and leaves the parameters
of ZeRO 3 gathered between uses.
"""

from __future__ import annotations

from typing import Any

from slope_dist.config.resolve import zero_stage
from slope_dist.config.schema import Config

# Buffers beyond this many elements gain no bandwidth and cost memory on every rank.
_LARGEST_BUCKET = 200_000_000
_NEVER = 2**31 - 1


def deepspeed_dict(
    config: Config,
    *,
    micro_batch_size: int,
    accumulation_steps: int,
    data_ranks: int,
    overlap_communication: bool = False,
) -> dict[str, Any]:
    """Return the dictionary that `deepspeed.initialize` takes for `config`.

    The batch is given in samples per micro-batch and rank, micro-batches per step and rank, and data-parallel ranks.
    `overlap_communication` lets gradients travel during backward: for GPUs, where it has streams to overlap on.
    The optimizer is not in it: the engine builds its own and hands it over.

    ZeRO 0 in bf16 or fp16 is written as stage 1: see `resolve.zero_stage`.
    """
    gradient_dtype = "fp32" if config.parallel.gradient_dtype == "fp32" else config.precision
    return {
        "train_batch_size": micro_batch_size * accumulation_steps * data_ranks,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": config.training.gradient_clipping,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": gradient_dtype,
        "data_types": {"grad_accum_dtype": gradient_dtype},
        "bf16": {
            "enabled": config.precision == "bf16",
            "check_grad_overflow": True,
            # Each gradient joins the accumulated ones as soon as it is there. Otherwise those of the whole share wait
            # for the end of backward, and stay in memory until the next step.
            "immediate_grad_update": True,
        },
        "fp16": _fp16(config),
        "zero_optimization": _zero(config, overlap_communication),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
        # Both wait for the device, these in every micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }


def _fp16(config: Config) -> dict[str, Any]:
    scale = config.loss_scale
    return {
        "enabled": config.precision == "fp16",
        "auto_cast": False,
        # 0 is DeepSpeed's word for a dynamic scale.
        "loss_scale": 0,
        "initial_scale_power": scale.initial_power,
        "loss_scale_window": scale.window,
        "min_loss_scale": int(scale.minimum),
        # Every overflow halves the scale at once: with more, the same step would be lost again.
        "hysteresis": 1,
        "consecutive_hysteresis": False,
    }


def _zero(config: Config, overlap_communication: bool) -> dict[str, Any]:
    model = config.model
    # Of this rank's part of the layers: both limits are elements that one rank holds.
    block = model.block_size // config.parallel.tensor
    table = model.vocab_size * model.token_embedding_size // config.parallel.tensor
    if config.sparsity.pattern == "2:4":
        block //= 2
    bucket = min(max(block, table), _LARGEST_BUCKET)
    return {
        "stage": zero_stage(config),
        "overlap_comm": overlap_communication,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_partitions": True,
        "allgather_bucket_size": bucket,
        "round_robin_gradients": False,
        "ignore_unused_parameters": True,
        "sub_group_size": 1_000_000_000,
        "stage3_param_persistence_threshold": config.parallel.zero3_persistence_threshold,
        # Release parameters right after use. What is gathered ahead is copied out of its buffer when its turn comes,
        # and may be too much by one matrix: with these, all of it stays within two blocks.
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": block,
        "stage3_prefetch_bucket_size": block // 4,
    }
