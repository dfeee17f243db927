"""From a config to the sizes that a family builds its model from."""

from __future__ import annotations

from slope_dist.config.model import ModelConfig
from slope_dist.models.shape import ModelShape, Rotary


def shape_of(model: ModelConfig) -> ModelShape:
    """The sizes that a config's section of the model asks for."""
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
        num_kv_heads=model.num_kv_heads,
        norm_epsilon=model.norm_epsilon,
        rotary=Rotary(
            base=model.rotary_base,
            scaling=model.rotary_scaling,
            low_factor=model.rotary_low_factor,
            high_factor=model.rotary_high_factor,
            original_length=model.rotary_original_length,
        ),
        tied_head=model.has_tied_head,
    )
