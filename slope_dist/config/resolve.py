"""What follows from a config without building a model: batches, ranks, steps, and what of it will not apply."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from slope_dist.config.schema import Config
from slope_dist.config.sections import LossScaleConfig, ParallelConfig, SparsityConfig
from slope_dist.config.watch import WatchConfig
from slope_dist.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Derived:
    """Values derived from a config and a number of ranks; see the functions of this module."""

    world_size: int
    data_ranks: int
    accumulation_steps: int
    tokens_per_step: int
    adapter_rank: int
    adapter_steps: int
    first_adapter_step: int
    backward_weight: Literal["derived", "resident"]


def derive(config: Config, ranks: int | None = None, source: str | None = None) -> Derived:
    """Return all derived values for `ranks` processes; None takes those that the config is meant for.

    Raises `UserError` where the ranks do not fit the layout or the batch; it names `source` as what says how many they
    are, None a launcher.
    """
    if ranks is None:
        ranks, source = config.parallel.gpus or world_size(config), "parallel.gpus"
    data = data_ranks(config, ranks, source)
    return Derived(
        world_size=ranks,
        data_ranks=data,
        accumulation_steps=accumulation_steps(config, data),
        tokens_per_step=tokens_per_step(config),
        adapter_rank=config.adapter_rank,
        adapter_steps=config.adapter_steps,
        first_adapter_step=first_adapter_step(config),
        backward_weight=backward_weight(config),
    )


def fit(config: Config, ranks: int) -> tuple[Config, str]:
    """Return the config in the first of its layouts that `ranks` processes fit, and a line on it; "" for its own.

    Raises `UserError`, which names all that was tried, where none fits.
    """
    try:
        derive(config, ranks)
        return config, ""
    except UserError as error:
        reason = str(error)
    for index, alternative in enumerate(config.parallel.alternatives):
        candidate = config.in_layout(alternative)
        with suppress(UserError):
            found = f"{layout_text(candidate, derive(candidate, ranks).data_ranks)}, because {reason}"
            return candidate, f"layout: parallel.alternatives[{index}], {found}"
    tried = "; ".join(
        f"[{index}] {layout_text(config.in_layout(alternative))}"
        for index, alternative in enumerate(config.parallel.alternatives)
    )
    others = f"; nor does any of parallel.alternatives fit {_counted(ranks)}: {tried}" if tried else ""
    raise UserError(f"{reason}{others}")


def layout_text(config: Config, data_ranks: int | None = None) -> str:
    """Return a layout in a few words; `data_ranks` are those there are, None: as the config says."""
    parallel = config.parallel
    data = data_ranks or parallel.data or "any"
    engine = parallel.engine if parallel.engine == "fsdp" else f"{parallel.engine} ZeRO {zero_stage(config)}"
    sequence = " (sequence)" if parallel.sequence_parallel and parallel.tensor > 1 else ""
    return (
        f"tensor {parallel.tensor}{sequence} x pipeline {parallel.pipeline} x data {data}, {engine}, micro-batch "
        f"{config.training.micro_batch_size}"
    )


def _counted(ranks: int) -> str:
    return f"{ranks} {'rank' if ranks == 1 else 'ranks'}"


def run_folder(config: Config) -> str:
    """Return `run.folder`, which `load_config` has filled in."""
    assert config.run.folder is not None, "the config did not come from load_config"
    return config.run.folder


def world_size(config: Config) -> int:
    """Return the ranks the config asks for; one data rank where `parallel.data` leaves it to the launcher."""
    return config.parallel.tensor * config.parallel.pipeline * (config.parallel.data or 1)


def data_ranks(config: Config, ranks: int, source: str | None = None) -> int:
    """Return the data-parallel ranks among `ranks` processes.

    Raises `UserError`, which names their `source` as `derive` does, where tensor x pipeline does not divide the
    processes, or `parallel.data` asks for others.
    """
    parallel = config.parallel
    model_ranks = parallel.tensor * parallel.pipeline
    product = f"parallel.tensor {parallel.tensor} x parallel.pipeline {parallel.pipeline}"
    if parallel.data is not None and model_ranks * parallel.data != ranks:
        wanted = model_ranks * parallel.data
        there = (
            f"{source} is {ranks}; make it" if source else f"{ranks} {'was' if ranks == 1 else 'were'} launched; launch"
        )
        raise UserError(
            f"{product} x parallel.data {parallel.data} = {wanted} ranks, but {there} {wanted}, "
            "or set parallel.data null"
        )
    if ranks % model_ranks:
        below, above = ranks // model_ranks * model_ranks, -(-ranks // model_ranks) * model_ranks
        there = f"{source} {ranks}; make it" if source else f"the {_counted(ranks)} launched; launch"
        raise UserError(
            f"{product} = {model_ranks} does not divide {there} {f'{below} or {above}' if below else above}, "
            "or change one of them"
        )
    return ranks // model_ranks


def accumulation_steps(config: Config, data_ranks: int) -> int:
    """Return the micro-batches each of `data_ranks` ranks accumulates in a step.

    Raises `UserError`, with the arithmetic, where the global batch does not come out even.
    """
    training = config.training
    together = training.micro_batch_size * data_ranks
    if training.global_batch_size % together:
        raise UserError(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of training.micro_batch_size "
            f"{training.micro_batch_size} x {data_ranks} data ranks = {together}; "
            f"{_micro_batch_that_fits(training.global_batch_size, data_ranks, training.micro_batch_size)}"
        )
    return training.global_batch_size // together


def _micro_batch_that_fits(global_batch: int, data_ranks: int, micro_batch: int) -> str:
    if global_batch % data_ranks:
        return f"set training.global_batch_size to a multiple of {data_ranks * micro_batch}"
    share = global_batch // data_ranks
    fitting = next(size for size in range(min(micro_batch, share), 0, -1) if share % size == 0)
    return f"training.micro_batch_size {fitting} would fit"


def tokens_per_step(config: Config) -> int:
    """Return the tokens of one optimizer step over all ranks."""
    return config.training.global_batch_size * config.model.sequence_length


def first_adapter_step(config: Config) -> int:
    """Return the first step, counted from 1, that trains with adapters; `training.steps` + 1 where none does."""
    return config.training.steps - config.adapter_steps + 1


def backward_weight(config: Config) -> Literal["derived", "resident"]:
    """Return where the doubly pruned transpose lives, with "auto" decided.

    Only at ZeRO 0 does a rank hold the whole optimizer state of its share, 48 bits an element beside which the 9 of a
    kept transpose are small; where that state is split over ranks, the transpose would dominate, and is made in
    backward. A pattern other than 2:4 has no compressed transpose to keep.
    """
    return _backward_weight(config)[0]


def backward_weight_reason(config: Config) -> str:
    """Return in a few words why the backward weight lives where it does."""
    return _backward_weight(config)[1]


def _backward_weight(config: Config) -> tuple[Literal["derived", "resident"], str]:
    if config.sparsity.backward_weight != "auto":
        return config.sparsity.backward_weight, "as sparsity.backward_weight says"
    other = sorted(config.sparsity.patterns - {"2:4"})
    if other:
        return "derived", f"auto: pattern {other[0]} has no compressed transpose to keep"
    if config.parallel.engine == "fsdp":
        return "derived", "auto: fsdp splits weights and optimizer state over the data ranks"
    if zero_stage(config):
        return "derived", f"auto: ZeRO {zero_stage(config)} splits the optimizer state over the data ranks"
    return "resident", "auto: at ZeRO 0 each rank holds the optimizer state of its share, beside which it is small"


def zero_stage(config: Config) -> int:
    """Return the stage DeepSpeed runs: that of the config, but 1 for stage 0 in bf16 or fp16.

    DeepSpeed 0.19 has no stage 0 that accumulates fp32 gradients beside narrower parameters, and its stage 0 for bf16
    takes an optimizer step of its own while it is built. Stage 1 gives the numbers stage 0 should.
    """
    stage = config.parallel.zero_stage
    return 1 if stage == 0 and config.precision != "fp32" else stage


def has_bf16_optimizer(config: Config) -> bool:
    """Whether DeepSpeed takes its BF16_Optimizer, which adds each gradient up in fp32 and reduces after the last."""
    parallel = config.parallel
    added_in_fp32 = config.precision == "bf16" and parallel.gradient_dtype == "fp32"
    return parallel.engine == "deepspeed" and zero_stage(config) == 1 and added_in_fp32


def threads_per_process(config: Config, local_ranks: int, processors: float | None = None) -> int:
    """Return `run.threads`, or where it is null the share of one of `local_ranks` processes in this machine's cores.

    Args:
        config: the run.
        local_ranks: on these cores.
        processors: whose time they may use, where that is limited.
    """
    # Not every system can say which of its cores this process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    usable = cores if processors is None else min(cores, processors)
    return config.run.threads or max(1, int(usable // local_ranks))


def without_effect(config: Config) -> list[str]:
    """Return one line for each setting that changes nothing in this run, with the reason."""
    lines = []
    if config.precision != "fp16" and config.loss_scale != LossScaleConfig():
        lines.append(f'loss_scale is used with precision "fp16" only; precision is "{config.precision}"')
    fsdp = config.parallel.engine == "fsdp"
    if zero_stage(config) != config.parallel.zero_stage and not fsdp:
        lines.append(
            f"parallel.zero_stage {config.parallel.zero_stage} in {config.precision} is run as {zero_stage(config)}, "
            "with the same result: DeepSpeed cannot accumulate fp32 gradients at stage 0"
        )
    if fsdp and "zero_stage" in config.parallel.model_fields_set:
        lines.append(
            f'parallel.zero_stage {config.parallel.zero_stage} is not read: parallel.engine "fsdp" splits optimizer '
            "state, gradients and parameters over the data ranks, as ZeRO 3 does"
        )
    gradients = config.parallel.gradient_dtype
    if gradients != ParallelConfig().gradient_dtype and config.precision == "fp32":
        lines.append(f'parallel.gradient_dtype "{gradients}" changes nothing: precision is "fp32"')
    if config.parallel.sequence_parallel and config.parallel.tensor == 1:
        lines.append("parallel.sequence_parallel changes nothing: parallel.tensor is 1")
    model = config.model
    if model.family in ("llama", "mistral") and model.rotary_scaling is None:
        for name in ("rotary_low_factor", "rotary_high_factor", "rotary_original_length"):
            if getattr(model, name) != type(model).model_fields[name].default:
                lines.append(f"model.{name} {getattr(model, name)} changes nothing: model.rotary_scaling is null")
    threshold = config.parallel.zero3_persistence_threshold
    if (fsdp or config.parallel.zero_stage != 3) and threshold != ParallelConfig().zero3_persistence_threshold:
        here = 'parallel.engine is "fsdp"' if fsdp else f"parallel.zero_stage is {config.parallel.zero_stage}"
        lines.append(f"parallel.zero3_persistence_threshold {threshold} is used at DeepSpeed's ZeRO 3 only; {here}")
    tried = {layout_text(config): "parallel"}
    for index, alternative in enumerate(config.parallel.alternatives):
        name, layout = f"parallel.alternatives[{index}]", layout_text(config.in_layout(alternative))
        if layout in tried:
            lines.append(f"{name} is never taken: {tried[layout]} is the same layout, and tried before it")
        tried.setdefault(layout, name)
    watch, usual = config.watch, WatchConfig()
    for key, off in (
        ("straggler_threshold", "straggler_interval is 0" if watch.straggler_interval == 0 else ""),
        ("on_drift", "drift_interval is 0" if watch.drift_interval == 0 else ""),
        ("first_step_timeout", "hang_timeout is null" if watch.hang_timeout is None else ""),
    ):
        if off and getattr(watch, key) != getattr(usual, key):
            lines.append(f"watch.{key} {json.dumps(getattr(watch, key))} changes nothing: watch.{off}")
    vendors = config.sparsity.vendors
    if config.sparsity.kernels == "reference" and vendors != SparsityConfig().vendors:
        lines.append(f'sparsity.vendors {json.dumps(vendors)} changes nothing: sparsity.kernels is "reference"')
    if config.sparsity.group is None:
        if config.adapters.rank:
            lines.append('no adapters are added: sparsity.pattern is "dense", and adapters stand beside sparse layers')
        if config.sparsity.dense_layers:
            lines.append('sparsity.dense_layers changes nothing: sparsity.pattern is "dense"')
    # A warm-up longer than the run is no error: a short trial of a long run's config has one.
    for name, warmup, steps in (
        ("training", config.training.warmup_steps, config.training.steps),
        ("adapters", config.adapters.warmup_steps, config.adapter_steps),
    ):
        if warmup >= steps > 0:
            lines.append(
                f"the peak learning rate is not reached: {name}.warmup_steps {warmup}, and {steps} steps to train "
                f"{'with adapters' if name == 'adapters' else ''}".rstrip()
            )
    if config.training.schedule == "constant" and config.training.min_learning_rate:
        lines.append(
            f"training.min_learning_rate {config.training.min_learning_rate} is not reached: training.schedule is "
            '"constant"'
        )
    return lines
