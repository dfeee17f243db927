"""Embeddings, norms, heads and the edges of the split region: the layers that stay dense."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from slope_dist.parallel.regions import TensorPlace, enter_split, enter_stream, whole_parameter


class Embedding(nn.Module):
    """Rows of a table, whole on every rank: ids int64 [...] -> [..., H]."""

    def __init__(self, name: str, table: Tensor, place: TensorPlace | None = None) -> None:
        super().__init__()
        self.name = name
        self.place = place or TensorPlace()
        self.weight = nn.Parameter(table)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., H]."""
        return functional.embedding(ids, self.weight)


class Head(nn.Module):
    """Logits over the vocabulary from a table: the token table (one parameter, used twice), or one of its own.

    Where the vocabulary is cut over tensor ranks these are the logits of this rank's rows, and those of rows that only
    pad the table to equal parts are minus infinity, which adds nothing to any softmax and gets no gradient.
    """

    def __init__(self, table: nn.Parameter, used_rows: int | None = None) -> None:
        super().__init__()
        # The parameter, not the module: engines that gather parameters per module must see that this one uses it.
        self.weight = table
        self.used_rows = used_rows

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V]."""
        logits = functional.linear(hidden, self.weight)
        if self.used_rows is None or self.used_rows == logits.shape[-1]:
            return logits
        padding = torch.arange(logits.shape[-1], device=logits.device) >= self.used_rows
        return logits.masked_fill(padding, -torch.inf)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last dimension, with weight and bias, in the residual stream."""

    def __init__(self, name: str, size: int, place: TensorPlace | None = None, *, epsilon: float = 1e-5) -> None:
        super().__init__(size, eps=epsilon)
        self.name = name
        self.place = place or TensorPlace()

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        if not self.place.sequence_parallel:
            return super().forward(x)
        weight, bias = (whole_parameter(parameter, self.place) for parameter in (self.weight, self.bias))
        return functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """Division by the root mean square over the last dimension, with a weight, in the residual stream."""

    def __init__(self, name: str, size: int, place: TensorPlace | None = None, *, epsilon: float = 1e-5) -> None:
        super().__init__(size, eps=epsilon)
        self.name = name
        self.place = place or TensorPlace()

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        if not self.place.sequence_parallel:
            return super().forward(x)
        return functional.rms_norm(x, self.normalized_shape, whole_parameter(self.weight, self.place), self.eps)


class SplitInput(nn.Module):
    """Where the residual stream enters column-split layers: one for all that read it, so that they share its sums."""

    def __init__(self, place: TensorPlace) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        return enter_split(x, self.place)


class StreamEntry(nn.Module):
    """Where what every rank has computed whole enters the residual stream."""

    def __init__(self, place: TensorPlace) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        return enter_stream(x, self.place)


class NextTokenLoss(nn.Module):
    """Mean cross-entropy in nats over the labels that are not ignored, computed in fp32."""

    IGNORED_LABEL = -100

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[B, S, V], int64 [B, S] -> scalar."""
        return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=self.IGNORED_LABEL)
