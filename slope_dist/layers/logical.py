"""The logical tensors of a model: global names and shapes, whatever module tree or rank they live in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slope_dist.layers.linear import LowRankAdapter


@dataclass(frozen=True)
class LogicalTensor:
    """One tensor of the model's state.

    Attributes:
        name: global name, such as "decoder.layers.3.fc1.weight.values".
        shape: its global shape, also where an engine has partitioned the tensor away.
        tensor: the live parameter or buffer.
        trained: False for metadata.
        decay: whether weight decay applies (matrices yes; biases and norms no).
        adapter: whether it belongs to a low-rank adapter.
    """

    name: str
    shape: tuple[int, ...]
    tensor: Tensor
    trained: bool
    decay: bool
    adapter: bool


def logical_tensors(model: nn.Module) -> Iterator[LogicalTensor]:
    """All of them in the model's own order. Layers say their global name; a tensor used twice is listed once."""
    for layer in model.modules():
        name = getattr(layer, "name", None)
        if name is None:
            continue
        adapter_ids = {
            id(p) for child in layer.modules() if isinstance(child, LowRankAdapter) for p in child.parameters()
        }
        for relative, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            # DeepSpeed's ZeRO 3 leaves an empty tensor behind and keeps the shape beside it.
            shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
            yield LogicalTensor(
                name=f"{name}.{relative}",
                shape=shape,
                tensor=tensor,
                trained=tensor.dtype != torch.uint8,
                decay=len(shape) > 1,
                adapter=id(tensor) in adapter_ids,
            )
