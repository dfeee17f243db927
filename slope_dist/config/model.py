"""The section of the model: the shapes of all families, and what has a meaning in which."""

from __future__ import annotations

import json
from typing import Literal, Self

from pydantic import Field, model_validator

from slope_dist.config.fields import DIMENSION_MULTIPLE, Layers, PositiveFloat, Section, Tokens, Width, neighbours

_ROTARY = ("llama", "mistral")
_KEYS_OF_FAMILIES = {
    "embedding_size": ("opt",),
    "norm_position": ("opt",),
    "num_kv_heads": _ROTARY,
    "rotary_base": _ROTARY,
    "rotary_scaling": _ROTARY,
    "rotary_low_factor": _ROTARY,
    "rotary_high_factor": _ROTARY,
    "rotary_original_length": _ROTARY,
}


class ModelConfig(Section):
    """The shape of the model and the size of its initial values."""

    family: Literal["opt", "gpt2", "llama", "mistral"] = Field(
        default="opt", description='Model family: "opt", "gpt2", "llama" (also LLaMA-2 and 3), "mistral" (v0.3).'
    )
    hidden_size: Width = Field(description="Width of the residual stream; a multiple of 8 and of `num_heads`.")
    num_layers: Layers = Field(description="Transformer blocks.")
    num_heads: Width = Field(description="Attention heads.")
    num_kv_heads: Width | None = Field(
        default=None,
        description="Key and value heads, each shared by equally many attention heads; divides `num_heads`; null: "
        "`num_heads`. For llama and mistral.",
    )
    ffn_size: Width = Field(description="Width inside the feed-forward block; a multiple of 8.")
    vocab_size: Tokens = Field(description="Rows of the embedding; also the size of a tokenizer trained for the run.")
    sequence_length: Tokens = Field(description="Tokens of a sample, and learned positions of the model.")
    embedding_size: Width | None = Field(
        default=None,
        description="Width of the token embedding, projected to `hidden_size` where they differ "
        "(OPT-350M: 512); a multiple of 8; null: `hidden_size`. For opt.",
    )
    norm_position: Literal["pre", "post"] = Field(
        default="pre", description='LayerNorm before ("pre") or after ("post", OPT-350M) each sub-block. For opt.'
    )
    norm_epsilon: PositiveFloat = Field(default=1e-5, description="Added to the variance in every norm.")
    tied_head: bool | None = Field(
        default=None,
        description="Whether the head is the token embedding; null: as the family has it, which is false for llama and "
        "mistral. Opt and gpt2 are always tied.",
    )
    rotary_base: PositiveFloat = Field(
        default=10_000.0,
        description="Base of the rotary positions (LLaMA-3: 500000, Mistral-v0.3: 1000000). For llama and mistral.",
    )
    rotary_scaling: PositiveFloat | None = Field(
        default=None,
        description="LLaMA-3's factor from `rotary_original_length` to longer sequences (LLaMA-3.1: 8); null: none. "
        "For llama and mistral.",
    )
    rotary_low_factor: PositiveFloat = Field(
        default=1.0,
        description="Features that turn less often than this within `rotary_original_length` are slowed by "
        "`rotary_scaling`.",
    )
    rotary_high_factor: PositiveFloat = Field(
        default=4.0,
        description="Features that turn more often than this keep their frequency; above `rotary_low_factor`.",
    )
    rotary_original_length: Tokens = Field(
        default=8192, description="Tokens of a sample before the scaling of rotary positions."
    )
    init_std: PositiveFloat = Field(default=0.02, description="Standard deviation of the initial weights.")
    scale_residual_init: bool = Field(
        default=True,
        description="Divide the standard deviation of the attention and feed-forward output projections by "
        "sqrt(2 `num_layers`).",
    )

    @property
    def token_embedding_size(self) -> int:
        """Width of the token embedding with the null of `embedding_size` filled in."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def block_size(self) -> int:
        """Elements of the matrices of a block."""
        attention = 2 * self.hidden_size * (self.hidden_size + self.key_size)
        return attention + (3 if self.family in _ROTARY else 2) * self.hidden_size * self.ffn_size

    @property
    def has_tied_head(self) -> bool:
        """Whether the head is the token embedding, with the null of `tied_head` filled in."""
        return self.family in ("opt", "gpt2") if self.tied_head is None else self.tied_head

    @property
    def key_size(self) -> int:
        """Outputs of the key and of the value projection."""
        return (self.num_kv_heads or self.num_heads) * (self.hidden_size // self.num_heads)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_family()
        for name in ("hidden_size", "ffn_size", "embedding_size"):
            size = getattr(self, name)
            if size is not None and size % DIMENSION_MULTIPLE:
                below, above = neighbours(size, DIMENSION_MULTIPLE)
                raise ValueError(
                    f"model.{name} {size} is not a multiple of {DIMENSION_MULTIPLE}; nearest: {below} or {above}"
                )
        if self.hidden_size % self.num_heads:
            fitting = [heads for heads in range(1, min(self.num_heads, 4096)) if self.hidden_size % heads == 0]
            raise ValueError(
                f"model.hidden_size {self.hidden_size} is not a multiple of model.num_heads {self.num_heads} "
                f"(remainder {self.hidden_size % self.num_heads}); {fitting[-1]} heads would fit"
            )
        self._check_heads()
        return self

    def _check_family(self) -> None:
        """Refuse what would have no effect in this family."""
        for name, families in _KEYS_OF_FAMILIES.items():
            value = getattr(self, name)
            if self.family not in families and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"model.{name} {json.dumps(value)} has no meaning for model.family "
                    f'"{self.family}"; it is for {" and ".join(families)}'
                )
        if self.tied_head is False and self.family in ("opt", "gpt2"):
            raise ValueError(f'model.tied_head false: the head of model.family "{self.family}" is always tied')

    def _check_heads(self) -> None:
        """Grouped queries and rotary pairs must come out even."""
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            fitting = [heads for heads in range(1, min(self.num_kv_heads, 4096)) if self.num_heads % heads == 0]
            raise ValueError(
                f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.num_kv_heads}; "
                f"{fitting[-1]} would fit"
            )
        if self.key_size % DIMENSION_MULTIPLE:
            raise ValueError(
                f"model.num_kv_heads {self.num_kv_heads} makes {self.key_size} keys, which is not a multiple of "
                f"{DIMENSION_MULTIPLE}; use more, or wider heads"
            )
        if self.family in _ROTARY and self.hidden_size // self.num_heads % 2:
            raise ValueError(
                f"model.num_heads {self.num_heads} makes heads of {self.hidden_size // self.num_heads} features; "
                "rotary positions turn pairs of them: use an even size"
            )
        if self.rotary_low_factor >= self.rotary_high_factor:
            raise ValueError(
                f"model.rotary_low_factor {self.rotary_low_factor} is not below model.rotary_high_factor "
                f"{self.rotary_high_factor}"
            )
