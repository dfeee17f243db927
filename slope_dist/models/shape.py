"""The sizes a family builds a model from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary positions: the base, and LLaMA-3's scaling to longer sequences than it was first trained on.

    A pair of features that turns more than `high_factor` times within `original_length` positions keeps its
    frequency, one that turns less than `low_factor` times is slowed by `scaling`.
    """

    base: float = 10_000.0
    scaling: float | None = None
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_length: int = 8192


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes and initial standard deviations of a decoder-only transformer."""

    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_size: int
    vocab_size: int
    sequence_length: int
    embedding_size: int
    norm_position: Literal["pre", "post"] = "pre"
    init_std: float = 0.02
    scale_residual_init: bool = True
    num_kv_heads: int | None = None
    norm_epsilon: float = 1e-5
    rotary: Rotary = Rotary()
    tied_head: bool = True

    @property
    def head_size(self) -> int:
        """Features of a head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads; each query head has its own where none are given."""
        return self.num_kv_heads or self.num_heads

    @property
    def residual_std(self) -> float:
        """Standard deviation of the two output projections of a block, which add to the residual stream 2 L times."""
        return self.init_std / (2 * self.num_layers) ** 0.5 if self.scale_residual_init else self.init_std
