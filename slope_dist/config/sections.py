"""The other sections of a run's config: one frozen, strict model each, with every default, unit and check within it.

Messages of the checks start with the dotted path of the key they are about, the same path that `--set` takes.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, Field, model_validator

from slope_dist.config.fields import (
    Count,
    CountOrZero,
    NonNegativeFloat,
    PathText,
    PositiveFloat,
    Ranks,
    Samples,
    Section,
    Threads,
)

ADAPTER_RANK_MULTIPLE = 16
MOST_LAYER_PATTERNS = 200
MOST_ALTERNATIVES = 100

Pattern = Literal["dense", "1:2", "2:4", "2:8", "4:8"]
_SPARSE = get_args(Pattern)[1:]
Vendor = Literal["cusparselt", "cutlass"]
BackwardWeight = Literal["auto", "derived", "resident"]
Precision = Literal["bf16", "fp16", "fp32"]
Engine = Literal["deepspeed", "fsdp"]
GPU = Literal["a100-40gb", "a100-80gb", "h100-80gb", "h200-141gb"]


def _layer_pattern(text: str) -> str:
    glob, _, pattern = text.rpartition("=")
    if not glob.strip() or pattern not in _SPARSE:
        raise ValueError(f'must be "GLOB=N:M" with N:M one of {", ".join(_SPARSE)}, such as "*.fc2=2:8"')
    return text


LayerPattern = Annotated[
    str,
    Field(max_length=1000, json_schema_extra={"pattern": rf"\S[\s\S]*=({'|'.join(_SPARSE)})$"}),
    AfterValidator(_layer_pattern),
]


class RunConfig(Section):
    """Where the run writes, and what it is seeded with."""

    folder: PathText | None = Field(
        default=None,
        description="Folder of all output of the run; null: `runs/<config file's name without .json>`.",
    )
    seed: int = Field(
        default=1234,
        ge=0,
        le=2**63 - 1,
        description="Seed of the initial values, the masks, the adapters and the order of samples.",
    )
    threads: Threads | None = Field(
        default=None,
        description="CPU threads of each process; null: the machine's cores divided by its local ranks.",
    )
    log_interval: Count = Field(default=1, description="Steps between two progress lines (metrics have every step).")


class SparsityConfig(Section):
    """Which weights are kept sparse, and how."""

    pattern: Pattern = Field(
        default="2:4",
        description='N of every M entries of a row are kept; "2:4" is stored compressed, "1:2", "2:8" '
        'and "4:8" run on the reference, "dense" prunes nothing.',
    )
    column_mask_interval: Count = Field(
        default=1,
        description="Optimizer steps between two choices of the column mask of the backward weight.",
    )
    backward_weight: BackwardWeight = Field(
        default="auto",
        description='The doubly pruned transpose is made when backward needs it ("derived") or kept '
        '("resident"; 2:4 only, not with ZeRO 3 or "fsdp"). "auto": resident with 2:4 where each rank holds the whole '
        'optimizer state of its share, which is ZeRO 0 (fp32) on "deepspeed"; otherwise derived.',
    )
    dense_layers: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="Glob patterns over global layer names that stay dense besides the built-in skip list.",
    )
    layer_patterns: tuple[LayerPattern, ...] = Field(
        default=(),
        strict=False,
        max_length=MOST_LAYER_PATTERNS,
        description='Other patterns for single layers: "GLOB=N:M" over global layer names, of which the first that '
        'matches counts, such as "decoder.layers.[6-9].*=2:8". Those that are not 2:4 run on the reference.',
    )

    kernels: Literal["auto", "reference"] = Field(
        default="auto",
        description='How 2:4 products are computed on GPUs: "auto" measures at the start of a run which way is fastest '
        "for each shape, and keeps what it found in the run folder; "
        '"reference" expands every weight in plain torch, which is what CPUs do.',
    )
    vendors: tuple[Vendor, ...] = Field(
        default=("cusparselt",),
        strict=False,
        description='Libraries that "auto" chooses from: "cusparselt" is loaded where torch has brought it, "cutlass" '
        "is compiled at first use, which takes minutes.",
    )

    @property
    def group(self) -> tuple[int, int] | None:
        """(N, M) of the pattern, or None where nothing is pruned."""
        if self.pattern == "dense":
            return None
        kept, of = self.pattern.split(":")
        return int(kept), int(of)

    @property
    def patterns(self) -> set[str]:
        """All patterns that some layer may have."""
        return {self.pattern, *(entry.rpartition("=")[2] for entry in self.layer_patterns)}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pattern == "dense" and self.column_mask_interval > 1:
            raise ValueError(
                f"sparsity.column_mask_interval {self.column_mask_interval} needs a sparse pattern, but "
                'sparsity.pattern is "dense"; use interval 1 or a pattern such as "2:4"'
            )
        if self.pattern == "dense" and self.layer_patterns:
            raise ValueError(
                f"sparsity.layer_patterns {json.dumps(self.layer_patterns)} needs a sparse sparsity.pattern, not "
                '"dense"; to keep the other layers dense, name them in sparsity.dense_layers'
            )
        if self.backward_weight == "resident" and self.patterns != {"2:4"}:
            other = next(pattern for pattern in sorted(self.patterns) if pattern != "2:4")
            raise ValueError(
                f'sparsity.backward_weight "resident" needs sparsity.pattern "2:4" for all layers, not "{other}"; '
                'use "auto" or "derived"'
            )
        if not all(pattern.strip() for pattern in self.dense_layers):
            raise ValueError("sparsity.dense_layers holds an empty pattern; remove it or name a layer")
        return self


class AdaptersConfig(Section):
    """The low-rank adapters that join the sparse layers at the end of the run."""

    fraction: float = Field(
        default=0.01,
        gt=0.0,
        le=1.0,
        description="Share of the steps, the last ones, that train with adapters.",
    )
    rank: int | float = Field(
        default=0.0156,
        union_mode="left_to_right",
        json_schema_extra={
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
            ]
        },
        description="A whole number is the rank itself (0: no adapters ever); a number between 0 and 1 is a "
        "fraction of `model.hidden_size`, rounded to a multiple of 16, at least 16.",
    )
    learning_rate_policy: Literal["follow", "rewarm_adapters", "rewarm_all"] = Field(
        default="follow",
        description="At the switch the adapters follow the run's schedule, or the adapters alone, or all "
        "parameters, warm up again to `peak_learning_rate`.",
    )
    peak_learning_rate: PositiveFloat | None = Field(
        default=None,
        description="Peak of the second warm-up; required by the rewarm policies, refused by follow.",
    )
    warmup_steps: CountOrZero = Field(default=0, description="Steps of the second warm-up; rewarm policies only.")
    weight_decay: NonNegativeFloat | None = Field(
        default=None, description="Weight decay of the adapters; null: `training.weight_decay`."
    )

    def adapter_rank(self, hidden_size: int) -> int:
        """Rank of the adapters of a model of width `hidden_size`; 0 where there are none."""
        if isinstance(self.rank, int):
            return self.rank
        nearest = int(self.rank * hidden_size / ADAPTER_RANK_MULTIPLE + 0.5) * ADAPTER_RANK_MULTIPLE
        return max(ADAPTER_RANK_MULTIPLE, nearest)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.rank, float) and not 0.0 < self.rank < 1.0:
            raise ValueError(
                f"adapters.rank {self.rank} is not a fraction between 0 and 1; write a whole number for an "
                "absolute rank, 0 for no adapters"
            )
        if isinstance(self.rank, int) and self.rank < 0:
            raise ValueError(f"adapters.rank {self.rank} is negative; use 0 for no adapters")
        if self.learning_rate_policy == "follow":
            for name in ("peak_learning_rate", "warmup_steps"):
                if getattr(self, name):
                    raise ValueError(
                        f"adapters.{name} {getattr(self, name)} has no use with adapters.learning_rate_policy "
                        '"follow"; remove it or use "rewarm_adapters" or "rewarm_all"'
                    )
        elif self.peak_learning_rate is None:
            raise ValueError(
                "adapters.peak_learning_rate is required by adapters.learning_rate_policy "
                f'"{self.learning_rate_policy}"; give the peak of the second warm-up'
            )
        return self


class TrainingConfig(Section):
    """Length, batch, optimizer and schedule."""

    steps: Count = Field(description="Optimizer steps of the run; steps count from 1.")
    global_batch_size: Samples = Field(description="Samples of a step over all ranks.")
    micro_batch_size: Samples = Field(description="Samples of one forward and backward pass on one rank.")
    learning_rate: PositiveFloat = Field(description="Peak learning rate.")
    min_learning_rate: NonNegativeFloat = Field(
        default=0.0, description="Learning rate at the last step of the cosine or linear schedule."
    )
    warmup_steps: CountOrZero = Field(
        default=0, description="Steps over which the learning rate rises linearly to its peak."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="Shape of the learning rate after the warm-up."
    )
    weight_decay: NonNegativeFloat = Field(default=0.1, description="AdamW's decoupled weight decay.")
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0, description="AdamW's decay rate of the first moment.")
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0, description="AdamW's decay rate of the second moment.")
    epsilon: PositiveFloat = Field(default=1e-8, description="AdamW's term in the denominator.")
    gradient_clipping: NonNegativeFloat = Field(
        default=1.0,
        description="Largest global gradient norm; larger gradients are scaled down to it; 0: off.",
    )
    recompute: Literal["none", "blocks"] = Field(
        default="none", description="Activations that backward computes again instead of keeping."
    )
    max_skipped_steps: Count = Field(
        default=3,
        description="Consecutive steps with a non-finite loss or gradient after which the run stops.",
    )
    compile: bool = Field(
        default=False,
        description="Run each transformer block as one graph compiled by torch.compile, shared by blocks that are "
        "alike; not with ZeRO 3.",
    )
    deterministic: bool = Field(
        default=False,
        description="Let torch, cuBLAS and the 2:4 kernels use only algorithms that give the same bits each time: a "
        "run repeated in the same layout, on the same cards, with the same libraries and the same choice of kernels "
        "(`kernels.json` of the run folder, which a second run needs a copy of, or `sparsity.kernels` "
        '"reference") has the same losses and weights, bit for bit. Costs speed on GPUs: slower attention '
        "gradients, fewer kernels to choose from. An operation that torch has no such "
        "algorithm for ends the run.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"training.global_batch_size {self.global_batch_size} is not a multiple of "
                f"training.micro_batch_size {self.micro_batch_size} "
                f"(remainder {self.global_batch_size % self.micro_batch_size})"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"training.min_learning_rate {self.min_learning_rate} is above "
                f"training.learning_rate {self.learning_rate}"
            )
        return self


class EvaluationConfig(Section):
    """When the validation split is read, and how much of it."""

    interval: CountOrZero = Field(default=1000, description="Steps between two evaluations; 0: only at the end.")
    samples: Count | None = Field(
        default=None,
        description="Validation samples of an evaluation, of each corpus; null: the whole validation split.",
    )


class LossScaleConfig(Section):
    """The dynamic loss scale; used with precision "fp16" only."""

    initial_power: int = Field(default=16, ge=0, le=32, description="The first scale is 2 to this power.")
    window: Count = Field(default=1000, description="Steps without overflow after which the scale doubles.")
    minimum: float = Field(default=1.0, ge=1.0, le=2.0**32, description="Smallest scale.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.minimum.is_integer():
            raise ValueError(f"loss_scale.minimum {self.minimum} must be a whole number")
        if self.minimum > 2.0**self.initial_power:
            raise ValueError(
                f"loss_scale.minimum {self.minimum} is above the first scale 2^{self.initial_power} = "
                f"{2**self.initial_power} (loss_scale.initial_power)"
            )
        return self


class AlternativeConfig(Section):
    """A layout to fall back on: what is other than in `parallel`. Null or absent keys are as there, except `data`."""

    engine: Engine | None = Field(default=None, description="Training engine.")
    tensor: Ranks | None = Field(default=None, description="Ranks that share each layer.")
    pipeline: Ranks | None = Field(default=None, description="Stages the blocks are spread over.")
    data: Ranks | None = Field(
        default=None, description="Data-parallel ranks; null: all ranks divided by `tensor` x `pipeline`."
    )
    zero_stage: int | None = Field(default=None, ge=0, le=3, description="ZeRO stage.")
    micro_batch_size: Samples | None = Field(
        default=None, description="Replaces `training.micro_batch_size`; the global batch stays as it is."
    )


class ParallelConfig(Section):
    """The engine, and how the run is laid out over ranks."""

    engine: Engine = Field(
        default="deepspeed",
        description='Training engine: "deepspeed", or "fsdp" for torch\'s FSDP2 (no pipeline, no fp16).',
    )
    tensor: Ranks = Field(
        default=1,
        description="Ranks that share each layer: heads, features and vocabulary are cut over them. Divides "
        "`model.num_heads`; `model.hidden_size` and `model.ffn_size` are multiples of 8 x this.",
    )
    pipeline: Ranks = Field(
        default=1,
        description="Stages the blocks are spread over, at most `model.num_layers`; above 1 needs engine "
        '"deepspeed" and ZeRO 0 or 1.',
    )
    data: Ranks | None = Field(
        default=None, description="Data-parallel ranks; null: all ranks divided by `tensor` x `pipeline`."
    )
    zero_stage: int = Field(
        default=1,
        ge=0,
        le=3,
        description="ZeRO stage: what is split over data ranks. 0 nothing, 1 optimizer state, "
        '2 and gradients, 3 and parameters. "fsdp" splits all of it and does not read this.',
    )
    sequence_parallel: bool = Field(
        default=False,
        description="Split the activations between split layers along the sequence over the tensor ranks; "
        "`model.sequence_length` is then a multiple of `tensor`.",
    )
    gradient_dtype: Literal["fp32", "model"] = Field(
        default="fp32",
        description='Dtype in which gradients are accumulated and reduced: "fp32", or "model" for that of '
        '`precision` ("fsdp" reduces in it and accumulates in fp32).',
    )
    zero3_persistence_threshold: CountOrZero = Field(
        default=100_000,
        description="ZeRO 3 keeps parameters of fewer elements than this whole on every rank.",
    )
    alternatives: tuple[AlternativeConfig, ...] = Field(
        default=(),
        strict=False,
        max_length=MOST_ALTERNATIVES,
        description="Other layouts, tried in this order where the ranks that are there do not fit the one above, such "
        "as after a machine was lost: a list of objects with the keys below. The global batch and the losses stay; "
        "`config.json` of the run folder has the layout that was taken.",
    )
    gpus: Ranks | None = Field(
        default=None,
        description="How many of `gpu` the layout is for: `--dry-run` and tools/plan.py take so many ranks; null: "
        "one data rank. Changes nothing in the run, which takes the ranks it finds.",
    )
    gpu: GPU | None = Field(
        default=None,
        description="GPU with whose memory the predicted peak of the fullest rank is compared at the start and by "
        "`--dry-run`; null: none. What is refused follows from the memory that the run finds.",
    )

    @property
    def shards_parameters(self) -> bool:
        """Whether parameters and metadata are sharded over data ranks, not only what trains them."""
        return self.engine == "fsdp" or self.zero_stage == 3

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pipeline > 1 and self.engine == "fsdp":
            raise ValueError(
                f'parallel.pipeline {self.pipeline} does not work with parallel.engine "fsdp"; use '
                'parallel.pipeline 1, or parallel.engine "deepspeed"'
            )
        if self.pipeline > 1 and self.zero_stage > 1:
            raise ValueError(
                f"parallel.zero_stage {self.zero_stage} does not work with parallel.pipeline {self.pipeline}: a stage "
                "accumulates whole gradients over its micro-batches, which ZeRO 2 and 3 split; use parallel.zero_stage "
                "1 or 0, or parallel.pipeline 1"
            )
        return self


class CheckpointConfig(Section):
    """When checkpoints are written, and how many stay. One is always written after the last step."""

    interval: CountOrZero = Field(
        default=1000, description="Steps between two checkpoints; 0: only after the last step."
    )
    keep: int = Field(
        default=2,
        ge=2,
        le=2**31 - 1,
        description="Newest checkpoints that stay; at least 2, lest a damaged one be the only.",
    )
    keep_every: Count | None = Field(
        default=None,
        description="Checkpoints whose step is a multiple of this stay for good; a multiple of `interval`; null: none.",
    )
    asynchronous: bool = Field(
        default=True,
        description="Write beside training, from a copy in host memory of what each rank saves; false: training waits, "
        "and no copy is made.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.keep_every is not None and (self.interval == 0 or self.keep_every % self.interval):
            raise ValueError(
                f"checkpoint.keep_every {self.keep_every} is not a multiple of checkpoint.interval {self.interval}: "
                "no checkpoint would fall on some of those steps"
            )
        return self
