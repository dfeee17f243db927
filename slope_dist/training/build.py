"""From a config to a model and an engine."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch

from slope_dist.config import Config, Derived, deepspeed_dict
from slope_dist.config.resolve import zero_stage
from slope_dist.engine import Engine
from slope_dist.errors import UserError
from slope_dist.layers import LayerFactory
from slope_dist.models import LanguageModel, ModelShape, build_model, family
from slope_dist.planning import ModelState, model_state
from slope_dist.sparse import Pattern

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def model_shape(config: Config) -> ModelShape:
    """The sizes of the config's model."""
    model = config.model
    return ModelShape(
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        ffn_size=model.ffn_size,
        vocab_size=model.vocab_size,
        sequence_length=model.sequence_length,
        embedding_size=model.token_embedding_size,
        norm_position=model.norm_position,
        init_std=model.init_std,
        scale_residual_init=model.scale_residual_init,
    )


def layer_factory(
    config: Config, derived: Derived, *, adapters: bool, draw: bool = True, device: str = "cpu"
) -> LayerFactory:
    """A factory for one phase of the run."""
    chosen = {glob: "sparsity.dense_layers" for glob in config.sparsity.dense_layers}
    return LayerFactory(
        seed=config.run.seed,
        pattern=None if config.sparsity.group is None else Pattern.parse(config.sparsity.pattern),
        dense_layers=family(config.model.family).dense_layers | chosen,
        hold_column_mask=config.sparsity.column_mask_interval > 1,
        resident_transpose=derived.backward_weight == "resident",
        shard_metadata=zero_stage(config) == 3,
        adapter_rank=derived.adapter_rank if adapters else 0,
        draw=draw,
        device=device,
    )


def build(config: Config, factory: LayerFactory) -> LanguageModel:
    """The config's model, its layers made by `factory`."""
    recompute = config.training.recompute == "blocks"
    return build_model(config.model.family, model_shape(config), factory, recompute=recompute)


def check_engine(config: Config) -> None:
    """Refuse, before anything is written, what the engine cannot do on this machine.

    Raises:
        UserError: naming what works.
    """
    from slope_dist.engine.deepspeed_engine import check_precision

    check_precision(config.precision)


def build_engine(config: Config, derived: Derived, *, adapters: bool, draw: bool = True) -> Engine:
    """The engine of one phase. Collective: every rank builds its own part.

    Args:
        config: the run.
        derived: its derived values for the ranks at hand.
        adapters: whether the low-rank adapters are there.
        draw: False where a state is about to be loaded.
    """
    from slope_dist.engine.deepspeed_engine import DeepSpeedEngine

    training = config.training
    settings = deepspeed_dict(
        config,
        micro_batch_size=training.micro_batch_size,
        accumulation_steps=derived.accumulation_steps,
        data_ranks=derived.data_ranks,
        overlap_communication=torch.cuda.is_available(),
    )
    decay = config.adapters.weight_decay
    return DeepSpeedEngine(
        build(config, layer_factory(config, derived, adapters=adapters, draw=draw)),
        settings,
        betas=(training.beta1, training.beta2),
        epsilon=training.epsilon,
        weight_decay=training.weight_decay,
        adapter_weight_decay=training.weight_decay if decay is None else decay,
        column_mask_interval=config.sparsity.column_mask_interval,
    )


def count_state(config: Config, derived: Derived, *, adapters: bool) -> tuple[ModelState, str]:
    """Model state of one rank in one phase, counted on the meta device, and which linears are sparse.

    Raises:
        UserError: if `sparsity.dense_layers` names a layer that is not there, or all that are.
    """
    factory = layer_factory(config, derived, adapters=adapters, device="meta")
    state = model_state(
        build(config, factory),
        weight_bytes=_BYTES[config.precision],
        gradient_bytes=4 if config.parallel.gradient_dtype == "fp32" else _BYTES[config.precision],
        zero_stage=zero_stage(config),
        data_ranks=derived.data_ranks,
        resident_transpose=derived.backward_weight == "resident",
    )
    names = [*factory.sparse, *factory.dense]
    for glob in config.sparsity.dense_layers:
        if not any(fnmatchcase(name, glob) for name in names):
            raise UserError(
                f'sparsity.dense_layers: "{glob}" matches no linear of this model; their names look like {names[-1]}'
            )
    if factory.pattern is not None and not factory.sparse:
        raise UserError('sparsity.dense_layers leaves no linear sparse; take some out, or set sparsity.pattern "dense"')
    return state, factory.summary()
