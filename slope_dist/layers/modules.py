"""Embedding, norm and tied head: the layers that stay dense."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class Embedding(nn.Module):
    """Rows of a table: ids int64 [...] -> [..., H]."""

    def __init__(self, name: str, table: Tensor) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(table)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., H]."""
        return functional.embedding(ids, self.weight)


class TiedHead(nn.Module):
    """Logits over the vocabulary from the embedding's own table (one parameter, used twice)."""

    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        # The parameter, not the module: engines that gather parameters per module must see that this one uses it.
        self.weight = embedding.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V]."""
        return functional.linear(hidden, self.weight)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last dimension, with weight and bias."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__(size)
        self.name = name
