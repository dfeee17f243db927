"""The schema of a run: its sections, and what must hold between them.

Read a file with `slope_dist.config.load_config`, which turns every failure into one `UserError` line. Building
a model here directly raises pydantic's `ValidationError` instead.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, ValidationError, model_validator

from slope_dist.config.data import DataConfig
from slope_dist.config.fields import DIMENSION_MULTIPLE, Section, neighbours
from slope_dist.config.model import ModelConfig
from slope_dist.config.sections import (
    AdaptersConfig,
    AlternativeConfig,
    CheckpointConfig,
    EvaluationConfig,
    LossScaleConfig,
    ParallelConfig,
    Precision,
    RunConfig,
    SparsityConfig,
    TrainingConfig,
)
from slope_dist.config.watch import WatchConfig


class Config(Section):
    """One run."""

    run: RunConfig = Field(default_factory=RunConfig, description="Output folder, seed, threads.")
    model: ModelConfig = Field(description="Shape of the model.")
    sparsity: SparsityConfig = Field(default_factory=SparsityConfig, description="The sparse weights.")
    adapters: AdaptersConfig = Field(default_factory=AdaptersConfig, description="The lazy adapters.")
    data: DataConfig = Field(description="Corpus and tokenizer.")
    training: TrainingConfig = Field(description="Length, batch, optimizer, schedule.")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="Validation.")
    precision: Precision = Field(
        default="bf16", description="Dtype of parameters and activations; optimizer state is fp32."
    )
    loss_scale: LossScaleConfig = Field(default_factory=LossScaleConfig, description="fp16's loss scale.")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="Engine and layout.")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="Checkpoints.")
    watch: WatchConfig = Field(
        default_factory=WatchConfig,
        description="What is looked for beside training: hangs, slow ranks, copies that differ.",
    )

    @property
    def adapter_rank(self) -> int:
        """Rank of this run's adapters; 0 where there are none: no rank given, or no sparse layer to help."""
        return 0 if self.sparsity.group is None else self.adapters.adapter_rank(self.model.hidden_size)

    @property
    def adapter_steps(self) -> int:
        """Number of steps, the last ones, that train with adapters; 0 where there are none."""
        if self.adapter_rank == 0:
            return 0
        return max(1, int(self.adapters.fraction * self.training.steps + 0.5))

    def in_layout(self, alternative: AlternativeConfig) -> Config:
        """This run in one of its other layouts, and without a choice of more.

        Raises pydantic's `ValidationError` where the run is not possible in it; never for one of its own.
        """
        tree = self.model_dump(exclude_unset=True)
        changes = alternative.model_dump(exclude_none=True)
        if "micro_batch_size" in changes:
            tree["training"]["micro_batch_size"] = changes.pop("micro_batch_size")
        kept = {key: value for key, value in tree["parallel"].items() if key not in ("alternatives", "data", "gpus")}
        return Config.model_validate(tree | {"parallel": kept | changes})

    @model_validator(mode="after")
    def _check(self) -> Self:
        rank = self.adapters.adapter_rank(self.model.hidden_size)
        if rank > self.model.hidden_size:
            raise ValueError(
                f"adapters.rank {self.adapters.rank} gives rank {rank}, above model.hidden_size "
                f"{self.model.hidden_size}; use a smaller rank, or 0 for no adapters"
            )
        # Without adapters (a dense control run of the same file) the re-warming has no use and does no harm.
        if self.parallel.data is not None:
            together = self.training.micro_batch_size * self.parallel.data
            if self.training.global_batch_size % together:
                raise ValueError(
                    f"training.global_batch_size {self.training.global_batch_size} is not a multiple of "
                    f"training.micro_batch_size {self.training.micro_batch_size} x parallel.data "
                    f"{self.parallel.data} = {together}"
                )
        if self.sparsity.backward_weight == "resident" and self.parallel.shards_parameters:
            what, instead = "parallel.zero_stage 3", "a stage below 3"
            if self.parallel.engine == "fsdp":
                what, instead = 'parallel.engine "fsdp"', 'parallel.engine "deepspeed" with a stage below 3'
            raise ValueError(
                'sparsity.backward_weight "resident" would keep a full replica on every rank, which '
                f'{what} is there to avoid; use "auto" or "derived", or {instead}'
            )
        if self.precision == "fp16" and self.parallel.engine == "fsdp":
            raise ValueError(
                'precision "fp16" does not work with parallel.engine "fsdp", which scales no loss; use precision '
                '"bf16", or parallel.engine "deepspeed"'
            )
        if self.training.compile and self.parallel.engine == "deepspeed" and self.parallel.zero_stage == 3:
            raise ValueError(
                "training.compile true does not work with parallel.zero_stage 3, which gathers weights inside the "
                'blocks; use training.compile false, parallel.engine "fsdp", or a stage below 3'
            )
        self._check_tensor_ranks()
        if self.model.num_layers < self.parallel.pipeline:
            raise ValueError(
                f"parallel.pipeline {self.parallel.pipeline} stages are more than model.num_layers "
                f"{self.model.num_layers}, and every stage needs a layer; parallel.pipeline {self.model.num_layers} "
                "is the most"
            )
        for index, alternative in enumerate(self.parallel.alternatives):
            try:
                self.in_layout(alternative)
            except ValidationError as error:
                # Each value has been checked, so what is left are checks between values.
                raise ValueError(f"parallel.alternatives[{index}]: {error.errors()[0]['ctx']['error']}") from None
        return self

    def _check_tensor_ranks(self) -> None:
        ranks = self.parallel.tensor
        problem = self._wrong_cut(ranks)
        if problem is None:
            return
        # One rank cuts nothing, and more than the heads never fit.
        fitting = next(
            size for size in range(min(ranks - 1, self.model.num_heads), 0, -1) if self._wrong_cut(size) is None
        )
        raise ValueError(f"{problem}; parallel.tensor {fitting} would fit")

    def _wrong_cut(self, ranks: int) -> str | None:
        """What `ranks` tensor ranks would cut apart: heads, groups and bytes of metadata (rule R3), or the sequence."""
        model = self.model
        if model.num_heads % ranks:
            return f"model.num_heads {model.num_heads} does not divide over parallel.tensor {ranks}"
        if model.num_kv_heads is not None and model.num_kv_heads % ranks:
            return f"model.num_kv_heads {model.num_kv_heads} does not divide over parallel.tensor {ranks}"
        unit = ranks * DIMENSION_MULTIPLE
        for name in ("hidden_size", "ffn_size"):
            size = getattr(model, name)
            if size % unit:
                below, above = neighbours(size, unit)
                return (
                    f"model.{name} {size} over parallel.tensor {ranks} would be cut inside a group of "
                    f"{DIMENSION_MULTIPLE}: it must be a multiple of {ranks} x {DIMENSION_MULTIPLE} = {unit}, such as "
                    + (f"{below} or {above}" if below < size else str(above))
                )
        if model.key_size % unit:
            return (
                f"model.num_kv_heads {model.num_kv_heads} makes {model.key_size} keys, which parallel.tensor {ranks} "
                f"would cut inside a group of {DIMENSION_MULTIPLE}"
            )
        if self.parallel.sequence_parallel and model.sequence_length % ranks:
            return (
                f"model.sequence_length {model.sequence_length} does not divide over parallel.tensor {ranks}, which "
                "parallel.sequence_parallel true asks for"
            )
        return None
