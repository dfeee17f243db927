"""From a config to a model and an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import nn

from slope_dist.config import Config, Derived, deepspeed_dict
from slope_dist.config.resolve import zero_stage
from slope_dist.engine import Engine
from slope_dist.engine.compilation import BlockCompiler, check_compiler
from slope_dist.engine.optimizer import OptimizerSettings
from slope_dist.errors import UserError
from slope_dist.layers import LayerFactory
from slope_dist.layers.modules import NextTokenLoss
from slope_dist.models import LanguageModel, build_model, family
from slope_dist.parallel.groups import Groups
from slope_dist.parallel.layout import stage_bounds
from slope_dist.parallel.regions import TensorPlace
from slope_dist.planning import ModelState, ParameterCount, ShareSize, Storage, count_parameters, measure
from slope_dist.planning.shapes import shape_of
from slope_dist.sparse import Pattern, exception_of

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def layer_factory(
    config: Config,
    derived: Derived,
    *,
    adapters: bool,
    draw: bool = True,
    device: str = "cpu",
    place: TensorPlace | None = None,
) -> LayerFactory:
    """A factory for one phase of the run, and one of its tensor ranks."""
    chosen = {glob: "sparsity.dense_layers" for glob in config.sparsity.dense_layers}
    return LayerFactory(
        seed=config.run.seed,
        pattern=None if config.sparsity.group is None else Pattern.parse(config.sparsity.pattern),
        dense_layers=family(config.model.family).dense_layers | chosen,
        layer_patterns=config.sparsity.layer_patterns,
        hold_column_mask=config.sparsity.column_mask_interval > 1,
        resident_transpose=derived.backward_weight == "resident",
        shard_metadata=config.parallel.shards_parameters,
        adapter_rank=derived.adapter_rank if adapters else 0,
        draw=draw,
        device=device,
        place=place or TensorPlace(),
    )


def tensor_place(config: Config, groups: Groups) -> TensorPlace:
    """This rank among the tensor ranks."""
    ranks = groups.layout.tensor
    return TensorPlace(groups.position.tensor, ranks, groups.tensor, config.parallel.sequence_parallel and ranks > 1)


def build(config: Config, factory: LayerFactory, prepare: Callable[[nn.Module], None] | None = None) -> LanguageModel:
    """The config's model, its layers made by `factory` and each given to `prepare` before the next is made."""
    recompute = config.training.recompute == "blocks"
    return build_model(config.model.family, shape_of(config.model), factory, recompute=recompute, prepare=prepare)


def check_engine(config: Config) -> None:
    """Refuse, before anything is written, what the engine cannot do on this machine.

    Raises:
        UserError: naming what works.
    """
    if config.parallel.engine == "deepspeed":
        from slope_dist.engine.deepspeed_engine import check_precision

        check_precision(config.precision)
    elif config.sparsity.patterns != {"dense"}:
        from slope_dist.engine.fsdp_engine import check_torch

        check_torch()
    if config.training.compile:
        check_compiler()


def build_engine(config: Config, derived: Derived, groups: Groups, *, adapters: bool, draw: bool = True) -> Engine:
    """The engine of one phase. Collective: every rank builds its own part.

    Args:
        config: the run.
        derived: its derived values for the ranks at hand.
        groups: process groups of the layout.
        adapters: whether the low-rank adapters are there.
        draw: False where a state is about to be loaded.
    """
    training = config.training
    decay = config.adapters.weight_decay
    optimizer = OptimizerSettings(
        betas=(training.beta1, training.beta2),
        epsilon=training.epsilon,
        weight_decay=training.weight_decay,
        adapter_weight_decay=training.weight_decay if decay is None else decay,
        gradient_clipping=training.gradient_clipping,
    )
    interval = config.sparsity.column_mask_interval
    factory = layer_factory(config, derived, adapters=adapters, draw=draw, place=tensor_place(config, groups))
    compiler = BlockCompiler() if training.compile else None

    def model(prepare: Callable[[nn.Module], None]) -> LanguageModel:
        made = build(config, factory, prepare)
        if compiler is not None:
            for block in made.blocks:
                compiler(block)
        return made

    if config.parallel.engine == "fsdp":
        from slope_dist.engine.fsdp_engine import FSDPEngine

        assert config.precision != "fp16", "refused by the schema"
        return FSDPEngine(
            model,
            groups,
            optimizer,
            precision=config.precision,
            gradient_dtype=config.parallel.gradient_dtype,
            column_mask_interval=interval,
        )
    settings = deepspeed_dict(
        config,
        micro_batch_size=training.micro_batch_size,
        accumulation_steps=derived.accumulation_steps,
        data_ranks=derived.data_ranks,
        overlap_communication=torch.cuda.is_available(),
    )
    if config.parallel.pipeline > 1:
        from slope_dist.engine.pipeline_engine import PipelineEngine

        layers = family(config.model.family).layers(factory, shape_of(config.model))
        if compiler is not None:
            layers[1:-1] = map(compiler.of, layers[1:-1])
        return PipelineEngine(
            layers,
            factory.next_token_loss(),
            stages(config, derived),
            groups,
            settings,
            optimizer,
            column_mask_interval=interval,
            recompute=training.recompute == "blocks",
        )
    from slope_dist.engine.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, groups, settings, optimizer, column_mask_interval=interval)


def stages(config: Config, derived: Derived) -> list[int]:
    """Bounds of the pipeline stages: by what each layer's matrices stand for, pruned elements included.

    Adapters, which join later, would move a layer, and so would trained elements alone: the few dense linears of the
    first block weigh double in memory, but a stage waits for the slowest one, not for the largest.
    """
    return list(_stages(config, derived))


@lru_cache(maxsize=8)
def _stages(config: Config, derived: Derived) -> tuple[int, ...]:
    if config.parallel.pipeline == 1:
        return 0, config.model.num_layers + 2

    def builders() -> list[Callable[[], nn.Module]]:
        factory = layer_factory(config, derived, adapters=False, device="meta")
        return family(config.model.family).layers(factory, shape_of(config.model))

    # The head made by itself counts its own copy of a tied table, as it has where it is on another stage.
    layers = [*builders()[:-1], builders()[-1]]
    return tuple(stage_bounds([measure(make()).elements for make in layers], config.parallel.pipeline))


def build_share(
    config: Config,
    derived: Derived,
    *,
    adapters: bool,
    tensor_rank: int = 0,
    stage: int = 0,
    device: str = "meta",
    prepare: Callable[[nn.Module], None] | None = None,
) -> nn.ModuleList:
    """The layers of one rank, made without process groups: to be counted or drawn, not run.

    Args:
        config: the run.
        derived: its derived values.
        adapters: whether the low-rank adapters are there.
        tensor_rank: which of the `parallel.tensor` ranks.
        stage: which of the `parallel.pipeline` stages.
        device: "meta" for shapes alone, "cpu" for initial values in fp32.
        prepare: given each layer before the next is made.

    Raises:
        ValueError: if the layout has no such rank.
    """
    ranks, bounds = config.parallel.tensor, stages(config, derived)
    if not (0 <= tensor_rank < ranks and 0 <= stage < len(bounds) - 1):
        raise ValueError(f"tensor rank {tensor_rank} of {ranks}, stage {stage} of {len(bounds) - 1}")
    factory = layer_factory(config, derived, adapters=adapters, device=device, place=TensorPlace(tensor_rank, ranks))
    layers = nn.ModuleList()
    for make in family(config.model.family).layers(factory, shape_of(config.model))[bounds[stage] : bounds[stage + 1]]:
        layer = make()
        if prepare is not None:
            prepare(layer)
        layers.append(layer)
    return layers


def sample_layers(
    config: Config, derived: Derived, *, adapters: bool, group: dist.ProcessGroup | None
) -> tuple[list[nn.Module], NextTokenLoss]:
    """Embedding, the first two blocks, head, and the loss, on the meta device: what all others are like.

    Where there is a pipeline the head has a table of its own, as it has on another stage than the embedding.

    Args:
        config: the run.
        derived: its derived values.
        adapters: whether the low-rank adapters are there.
        group: of the tensor ranks; None where there is one.
    """
    ranks = config.parallel.tensor
    place = TensorPlace(0, ranks, group, config.parallel.sequence_parallel and ranks > 1)

    def builders() -> tuple[LayerFactory, list[Callable[[], nn.Module]]]:
        factory = layer_factory(config, derived, adapters=adapters, device="meta", place=place)
        return factory, family(config.model.family).layers(factory, shape_of(config.model))

    factory, made = builders()
    layers = [make() for make in made[: min(3, len(made) - 1)]]
    head = builders()[1][-1] if config.parallel.pipeline > 1 else made[-1]
    return [*layers, head()], factory.next_token_loss()


@dataclass(frozen=True)
class StateCount:
    """Model state of a run in one phase.

    Attributes:
        parameters: of the whole model.
        summary: which linears are sparse.
        shares: what a rank of each pipeline stage holds; tensor ranks hold equal amounts.
        states: its bytes, after the data ranks have divided it.
    """

    parameters: ParameterCount
    summary: str
    shares: tuple[ShareSize, ...]
    states: tuple[ModelState, ...]

    @property
    def heaviest_stage(self) -> int:
        """The stage whose ranks hold most."""
        return max(range(len(self.states)), key=lambda stage: self.states[stage].bytes)

    @property
    def heaviest(self) -> ModelState:
        """The state of one of its ranks."""
        return self.states[self.heaviest_stage]


def storage(config: Config, derived: Derived) -> Storage:
    """How the config's engine stores a rank's share."""
    resident = derived.backward_weight == "resident"
    width, stage = _BYTES[config.precision], zero_stage(config)
    # The fp32 value and two moments; where another dtype computes, the narrow value too, which is what others load.
    saved = 12 if width == 4 else 12 + width
    if config.parallel.engine == "fsdp":
        # Shards are fp32, gradients included; narrower copies live only while a block is gathered.
        return Storage(
            weight_bytes=4,
            gradient_bytes=4,
            master_bytes=0,
            saved_bytes=saved,
            zero_stage=3,
            resident_transpose=resident,
        )
    return Storage(
        weight_bytes=width,
        gradient_bytes=4 if config.parallel.gradient_dtype == "fp32" else width,
        # DeepSpeed keeps masters apart from fp32 parameters too, unless nothing is partitioned.
        master_bytes=4 if stage else 0,
        saved_bytes=saved,
        zero_stage=stage,
        resident_transpose=resident,
        # Where weights are sharded over data ranks it is made for every product.
        kernel_metadata=_uses_vendors(config) and not config.parallel.shards_parameters,
    )


def _uses_vendors(config: Config) -> bool:
    """Whether 2:4 products may be those of a GPU library, which has none for fp32."""
    sparsity = config.sparsity
    on_gpu = torch.cuda.is_available() or config.parallel.gpu is not None
    return on_gpu and sparsity.kernels == "auto" and bool(sparsity.vendors) and config.precision != "fp32"


@lru_cache(maxsize=8)
def count_state(config: Config, derived: Derived, *, adapters: bool) -> StateCount:
    """Parameters of the model and model state of its ranks in one phase, counted on the meta device.

    Raises:
        UserError: if `sparsity.dense_layers` names a layer that is not there, or all that are.
    """
    factory = layer_factory(config, derived, adapters=adapters, device="meta")
    parameters = count_parameters(build(config, factory))
    names = [*factory.sparse, *factory.dense]
    for glob in config.sparsity.dense_layers:
        if not any(fnmatchcase(name, glob) for name in names):
            raise UserError(
                f'sparsity.dense_layers: "{glob}" matches no linear of this model; their names look like {names[-1]}'
            )
    used = {exception_of(name, config.sparsity.layer_patterns) for name in factory.sparse}
    for entry in config.sparsity.layer_patterns:
        if entry not in used:
            raise UserError(
                f'sparsity.layer_patterns: "{entry}" is the first match of no sparse linear of this model; their names '
                f"look like {names[-1]}"
            )
    if factory.pattern is not None and not factory.sparse:
        raise UserError('sparsity.dense_layers leaves no linear sparse; take some out, or set sparsity.pattern "dense"')
    shares = tuple(
        measure(build_share(config, derived, adapters=adapters, stage=stage))
        for stage in range(config.parallel.pipeline)
    )
    stored = storage(config, derived)
    states = tuple(ModelState.of(share, stored, derived.data_ranks) for share in shares)
    return StateCount(parameters, factory.summary(), shares, states)
