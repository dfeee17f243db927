"""The sizes a family builds a model from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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

    @property
    def residual_std(self) -> float:
        """Standard deviation of the two output projections of a block, which add to the residual stream 2 L times."""
        return self.init_std / (2 * self.num_layers) ** 0.5 if self.scale_residual_init else self.init_std
