"""One linear layer for every case: a weight (dense or N:M), a placement, a bias and, in the last steps, an adapter."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from slope_dist.parallel.regions import TensorPlace, leave_split, whole_parameter, whole_product
from slope_dist.sparse import DenseWeight, Weight

Split = Literal["column", "row", "whole"]
"""How a layer is cut over tensor ranks: "column" its outputs, "row" its inputs, "whole" (always dense) not at all."""

_SPLIT_DIMS: dict[Split, dict[str, int]] = {
    "column": {"weight": 0, "bias": 0, "adapter.up": 0},
    "row": {"weight": 1, "adapter.down": 1},
    "whole": {},
}


class LowRankAdapter(nn.Module):
    """Adds X down^T up^T / R to a layer's output (arXiv 2405.16325 section 4.4): down [R, I], up [O, R].

    down starts normal with standard deviation 1, up zero, so that adding an adapter does not change the loss. The
    factors are cut with the layer: up of a column-split one, down of a row-split one, whose product is then a partial
    sum like that of the layer itself. The other factor is whole on every tensor rank.
    """

    def __init__(
        self, down: Tensor, out_features: int, *, split: Literal["column", "row"], place: TensorPlace | None = None
    ) -> None:
        super().__init__()
        self.scale = 1.0 / down.shape[0]
        self.split = split
        self.place = place or TensorPlace()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(out_features, down.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O], sizes of the shard."""
        # Scaled between the factors: down has unit entries, and R of them summed could leave the range of fp16.
        if self.split == "column":
            return functional.linear(whole_product(x, self.down, self.place) * self.scale, self.up)
        return whole_product(functional.linear(x, self.down) * self.scale, self.up, self.place)


class Linear(nn.Module):
    """Y = X W^T (+ adapter) (+ bias).

    The input of a column-split layer comes through `LayerFactory.split_input`; its output is this rank's features.
    The input of a row-split layer is this rank's features; its output is back in the residual stream.
    """

    def __init__(
        self,
        name: str,
        weight: Weight,
        *,
        bias: bool,
        split: Split,
        adapter: LowRankAdapter | None = None,
        place: TensorPlace | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.split = split
        self.place = place or TensorPlace()
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(weight.shape[0])) if bias else None
        self.adapter = adapter

    def split_dim(self, relative: str) -> int | None:
        """The dimension in which one of its tensors is cut over tensor ranks."""
        dims = _SPLIT_DIMS[self.split]
        return dims.get(relative, dims.get(relative.split(".")[0]))

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        # In the stream, under sequence parallelism, each rank sees the gradient of its own tokens.
        own_tokens = self.place.sequence_parallel
        # A bias that every tensor rank has whole is added once, to the sum of their products.
        whole_bias = self.split != "column" and self.place.ranks > 1
        bias = None if whole_bias else self.bias
        adapter, weight = self.adapter, self.weight
        if own_tokens and self.split == "whole":
            assert isinstance(weight, DenseWeight) and adapter is None
            y = weight(x, product=partial(whole_product, place=self.place))
        elif adapter is not None and self.place.ranks == 1 and weight.takes_adapters():
            y = weight.product_with_adapter(x, bias, adapter.down, adapter.up, adapter.scale)
        else:
            y = weight(x, bias, None if adapter is None else adapter(x))
        if self.split == "row":
            y = leave_split(y, self.place)
        if self.bias is None or not whole_bias:
            return y
        return y + (whole_parameter(self.bias, self.place) if own_tokens else self.bias)
