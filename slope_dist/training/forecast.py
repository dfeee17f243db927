"""The memory and the time that a run will take, told before it is run."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from itertools import pairwise
from operator import add

import torch

from slope_dist.config import Config, Derived, deepspeed_dict
from slope_dist.config.resolve import has_bf16_optimizer, zero_stage
from slope_dist.parallel.layout import stage_bounds
from slope_dist.planning import ModelState, ShareSize, measure
from slope_dist.planning.activations import Layer, run_layers, tensor_ranks
from slope_dist.planning.cluster import Cluster
from slope_dist.planning.peaks import EngineSetting, Kind, LayerSize, Peak, Stage, peak, resting
from slope_dist.planning.products import ProductTimes
from slope_dist.planning.step_time import StepTime, step_time
from slope_dist.planning.traffic import Message, messages
from slope_dist.sparse import SparseWeight
from slope_dist.sparse.kernels.ops import gradient_rows
from slope_dist.training.build import build_share, count_state, sample_layers, stages, storage

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MARGIN = 1.15
"""What is predicted is to fit so many times: by so much a prediction may be too small, and what it does not know, such
as the CUDA context, is in it."""


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """A rank of one pipeline stage, in bytes.

    Attributes:
        trained: elements that a tensor rank trains, before the adapters.
        before: until the adapters join, or for the whole run where there are none.
        after: from then on; None where there are none.
        switch: the most while they join; None where there are none.
        waiting: host memory in which the state waits while they join; 0 on CPUs, where that is part of `switch`.
        states: model state before and after.
        copy: host memory from which checkpoints are written.
    """

    trained: int
    before: Peak
    after: Peak | None
    switch: int | None
    waiting: int
    states: tuple[ModelState, ...]
    copy: int

    @property
    def most(self) -> int:
        """The worst of it."""
        return max(self.before.bytes, self.switch or 0, self.after.bytes if self.after else 0)


def most_of(stages: Iterable[StageMemory]) -> int:
    """Bytes of the fullest rank of any stage at its fullest."""
    return max(stage.most for stage in stages)


def fits(stages: Iterable[StageMemory], memory: int) -> bool:
    """Whether that leaves the margin of a GPU's memory free."""
    return MARGIN * most_of(stages) <= memory


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Embedding, first block, another block and head, which all layers are like.

    Attributes:
        layers: activations of a micro-batch in each.
        shares: what a tensor rank holds of each.
        ends: embedding and head together, which may have a table in common.
    """

    layers: tuple[Layer, ...]
    shares: tuple[ShareSize, ...]
    ends: ShareSize

    @property
    def sizes(self) -> tuple[LayerSize, ...]:
        """Of each."""
        return tuple(
            LayerSize(trained=share.trained, metadata=share.metadata, largest=share.largest) for share in self.shares
        )

    def index(self, layer: int, last: int) -> int:
        """Which of them a layer is like; of all layers the first is the embedding and the last the head."""
        return 0 if layer == 0 else len(self.shares) - 1 if layer == last else min(layer, len(self.shares) - 2)


def predict_step(
    config: Config, derived: Derived, cluster: Cluster, times: ProductTimes, *, adapters: bool
) -> StepTime:
    """The time of a step in one phase.

    Args:
        config: the run.
        derived: for as many ranks as the cluster has.
        cluster: where it runs.
        times: of its products.
        adapters: whether they have joined.
    """
    adapters = adapters and derived.adapter_rank > 0
    if not _are_alike(config):
        built = [
            list(build_share(config, derived, adapters=adapters, stage=stage))
            for stage in range(config.parallel.pipeline)
        ]
        shares = count_state(config, derived, adapters=adapters).shares
        return step_time(config, derived, built, shares, cluster, times)
    known = sample(config, derived, adapters=adapters, on_gpu=True)
    layers, _ = sample_layers(config, derived, adapters=adapters, group=None)
    last = config.model.num_layers + 1
    chosen = [
        [layers[known.index(layer, last)] for layer in range(start, stop)]
        for start, stop in pairwise(bounds_of(config, derived, known))
    ]
    return step_time(config, derived, chosen, shares_of(config, derived, known, adapters=adapters), cluster, times)


def predict_traffic(config: Config, derived: Derived) -> list[list[Message]]:
    """What a rank of each pipeline stage sends in a step before the adapters."""
    known = sample(config, derived, adapters=False, on_gpu=True)
    shares = shares_of(config, derived, known, adapters=False)
    last, found = config.model.num_layers + 1, []
    for stage, (start, stop) in enumerate(pairwise(bounds_of(config, derived, known))):
        blocks = sum(0 < layer < last for layer in range(start, stop))
        found.append(messages(config, derived, stage, blocks, shares[stage]))
    return found


@lru_cache(maxsize=64)
def forecast(config: Config, derived: Derived, *, on_gpu: bool) -> tuple[StageMemory, ...]:
    """What each pipeline stage's ranks take.

    Args:
        config: the run.
        derived: its derived values.
        on_gpu: whether it runs on GPUs, or on CPUs.
    """
    phases = (False, True) if derived.adapter_steps else (False,)
    setting = engine_setting(config, derived, on_gpu=on_gpu)
    stored = storage(config, derived)
    found = []
    samples = [sample(config, derived, adapters=adapters, on_gpu=on_gpu) for adapters in phases]
    shares = [
        shares_of(config, derived, known, adapters=adapters) for known, adapters in zip(samples, phases, strict=True)
    ]
    for number in range(config.parallel.pipeline):
        states = [ModelState.of(phase[number], stored, derived.data_ranks) for phase in shares]
        peaks = [
            peak(phase[number], state, setting, stage_of(config, derived, known, number))
            for phase, state, known in zip(shares, states, samples, strict=True)
        ]
        found.append(
            StageMemory(
                trained=shares[0][number].trained,
                before=peaks[0],
                after=peaks[-1] if len(phases) > 1 else None,
                switch=_switch(states, setting, on_gpu=on_gpu),
                waiting=states[0].carried if on_gpu and len(phases) > 1 else 0,
                states=tuple(states),
                copy=states[-1].saved if config.checkpoint.asynchronous else 0,
            )
        )
    return tuple(found)


def _switch(states: Sequence[ModelState], setting: EngineSetting, *, on_gpu: bool) -> int | None:
    """The new engine at rest and, where GPUs have no host to give it to, the state of the old one."""
    if len(states) == 1:
        return None
    return resting(states[1], setting) + (0 if on_gpu else states[0].carried)


def bounds_of(config: Config, derived: Derived, samples: Samples) -> list[int]:
    """As `build.stages`, without building every layer."""
    if not _are_alike(config):
        return stages(config, derived)
    last = config.model.num_layers + 1
    weights = [samples.shares[samples.index(layer, last)].elements for layer in range(last + 1)]
    return stage_bounds(weights, config.parallel.pipeline)


def shares_of(config: Config, derived: Derived, samples: Samples, *, adapters: bool) -> tuple[ShareSize, ...]:
    """What a tensor rank of each stage holds."""
    if not _are_alike(config):
        return count_state(config, derived, adapters=adapters).shares
    bounds = bounds_of(config, derived, samples)
    last = config.model.num_layers + 1
    found = []
    for start, stop in pairwise(bounds):
        whole = start == 0 and stop == last + 1
        layers = range(1, last) if whole else range(start, stop)
        parts = [samples.shares[samples.index(layer, last)] for layer in layers]
        found.append(reduce(add, parts, *([samples.ends] if whole else [])))
    return tuple(found)


def _are_alike(config: Config) -> bool:
    """Whether all blocks but the first hold the same."""
    return not config.sparsity.dense_layers and not config.sparsity.layer_patterns


def engine_setting(config: Config, derived: Derived, *, on_gpu: bool) -> EngineSetting:
    """The engine's part of it."""
    width = _DTYPES[config.precision].itemsize
    zero = deepspeed_dict(
        config,
        micro_batch_size=config.training.micro_batch_size,
        accumulation_steps=derived.accumulation_steps,
        data_ranks=derived.data_ranks,
    )["zero_optimization"]
    return EngineSetting(
        kind=_kind(config),
        width=width,
        gradient_width=4 if config.parallel.gradient_dtype == "fp32" else width,
        data_ranks=derived.data_ranks,
        bucket=zero["reduce_bucket_size"],
        gathered_ahead=zero["stage3_prefetch_bucket_size"],
        accumulation=derived.accumulation_steps,
        fused=on_gpu,
        recompute=config.training.recompute == "blocks",
        overlap=on_gpu,
    )


def _kind(config: Config) -> Kind:
    if config.parallel.engine == "fsdp":
        return "fsdp"
    if has_bf16_optimizer(config):
        return "bf16"
    kinds: dict[int, Kind] = {0: "whole", 1: "zero 1", 2: "zero 2", 3: "zero 3"}
    return kinds[zero_stage(config)]


_samples: dict[Hashable, Samples] = {}


def sample(config: Config, derived: Derived, *, adapters: bool, on_gpu: bool) -> Samples:
    """Run the sample layers of a phase on one micro-batch, once for all layouts in which they are the same.

    Raises:
        PredictedTooLateError: there are tensor ranks, the process group is there, and nobody asked before.
    """
    training, model, parallel = config.training, config.model, config.parallel
    adapters = adapters and derived.adapter_rank > 0
    # DeepSpeed's BF16_Optimizer takes each gradient as it comes.
    widened = torch.float32 if _kind(config) == "bf16" else None
    key = (
        *(model, config.sparsity, config.precision, derived.adapter_rank, adapters, derived.backward_weight, on_gpu),
        *(parallel.tensor, parallel.sequence_parallel, parallel.shards_parameters, parallel.pipeline > 1),
        *(training.micro_batch_size, training.recompute, widened),
    )
    if key not in _samples:
        with tensor_ranks(parallel.tensor) as group:
            layers, loss = sample_layers(config, derived, adapters=adapters, group=group)
            shares = tuple(measure(layer) for layer in layers)
            ends = measure(torch.nn.ModuleList([layers[0], layers[-1]]))
            kernels = on_gpu and config.sparsity.kernels == "auto"
            found = run_layers(
                layers,
                loss,
                batch=training.micro_batch_size,
                length=model.sequence_length,
                dtype=_DTYPES[config.precision],
                recompute=training.recompute == "blocks",
                on_gpu=on_gpu,
                with_kernels=kernels,
                widened=widened,
            )
            if kernels:
                found = [
                    replace(layer, backward=layer.backward + _workspace(module, derived, config))
                    for layer, module in zip(found, layers, strict=True)
                ]
        _samples[key] = Samples(layers=tuple(found), shares=shares, ends=ends)
    return _samples[key]


def _workspace(layer: torch.nn.Module, derived: Derived, config: Config) -> int:
    """Bytes that kernels of 2:4 products take inside themselves in backward, which fake tensors do not show."""
    width = _DTYPES[config.precision].itemsize
    shapes = [m.shape for m in layer.modules() if isinstance(m, SparseWeight)]
    if not shapes:
        return 0
    largest = max(rows * columns for rows, columns in shapes)
    # The transposed weight where it is made for each product; a dense weight gradient, of which the kept are taken.
    transposed = 0 if derived.backward_weight == "resident" else largest * width // 2 + largest // 8
    return max(transposed, *(gradient_rows(rows, columns) * columns * width for rows, columns in shapes))


def stage_of(config: Config, derived: Derived, samples: Samples, number: int) -> Stage:
    """The layers of a pipeline stage."""
    bounds = bounds_of(config, derived, samples)
    last = config.model.num_layers + 1
    chosen = [samples.index(layer, last) for layer in range(bounds[number], bounds[number + 1])]
    pipeline = config.parallel.pipeline
    width = _DTYPES[config.precision].itemsize
    logits = tokens_of(config) * -(-config.model.vocab_size // config.parallel.tensor) * width
    passed = passed_bytes(config)
    in_flight = min(pipeline - number, derived.accumulation_steps)
    # What is received is copied before it is used.
    received = 0 if number == 0 else 2 * passed
    buffers = passed if pipeline > 1 else 0
    if pipeline > 1 and number == pipeline - 1:
        # There are always two slots, and the last stage leaves in each what it received and the logits.
        buffers += min(2, derived.accumulation_steps) * (logits + received)
        received = 0
    return Stage(
        layers=[samples.layers[i] for i in chosen],
        sizes=[samples.sizes[i] for i in chosen],
        pipelined=pipeline > 1,
        in_flight=in_flight,
        received=received,
        buffers=buffers,
    )


def tokens_of(config: Config) -> int:
    """Of a micro-batch."""
    return config.training.micro_batch_size * config.model.sequence_length


def passed_bytes(config: Config) -> int:
    """Activations of a micro-batch between two layers, on one tensor rank."""
    part = config.parallel.tensor if config.parallel.sequence_parallel else 1
    return tokens_of(config) // part * config.model.hidden_size * _DTYPES[config.precision].itemsize
