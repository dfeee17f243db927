"""One linear layer for every case: a weight (dense or N:M), a placement, a bias and, in the last steps, an adapter."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from slope_dist.sparse import Weight

Split = Literal["column", "row"]
"""How a layer would be cut over tensor ranks: "column" cuts its outputs, "row" its inputs."""


class LowRankAdapter(nn.Module):
    """Adds X down^T up^T / R to a layer's output (arXiv 2405.16325 section 4.4): down [R, I], up [O, R].

    down starts normal with standard deviation 1, up zero, so that adding an adapter does not change the loss.
    """

    def __init__(self, down: Tensor, out_features: int) -> None:
        super().__init__()
        self.scale = 1.0 / down.shape[0]
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(out_features, down.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        # Scaled between the factors: down has unit entries, and R of them summed could leave the range of fp16.
        return functional.linear(functional.linear(x, self.down) * self.scale, self.up)


class Linear(nn.Module):
    """Y = X W^T (+ adapter) (+ bias)."""

    def __init__(
        self, name: str, weight: Weight, *, bias: bool, split: Split, adapter: LowRankAdapter | None = None
    ) -> None:
        super().__init__()
        self.name = name
        self.split = split
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(weight.shape[0])) if bias else None
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        y = self.weight(x)
        if self.adapter is not None:
            y = y + self.adapter(x)
        return y if self.bias is None else y + self.bias
