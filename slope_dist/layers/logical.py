"""The logical tensors of a model: global names and shapes, whatever module tree or rank they live in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slope_dist.layers.linear import LowRankAdapter
from slope_dist.parallel.fragments import Rectangle, whole
from slope_dist.parallel.regions import TensorPlace


@dataclass(frozen=True)
class LogicalTensor:
    """One tensor of the model's state.

    Attributes:
        name: global name, such as "decoder.layers.3.fc1.weight.values".
        shape: its global shape, also where an engine has partitioned the tensor away.
        rectangle: the part of it that is this tensor rank's. A vocabulary padded to equal parts has rows beyond it,
            which come last in the live tensor and belong to no state.
        tensor: the live parameter or buffer.
        trained: False for metadata.
        decay: whether weight decay applies (matrices yes; biases and norms no).
        adapter: whether it belongs to a low-rank adapter.
        split: whether the tensor ranks hold different parts of it.
        owned: whether this rank is the one that counts and saves it: of tensors that are whole on several tensor
            ranks or live on two pipeline stages, exactly one copy is.
    """

    name: str
    shape: tuple[int, ...]
    rectangle: Rectangle
    tensor: Tensor
    trained: bool
    decay: bool
    adapter: bool
    split: bool
    owned: bool


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
            local = tuple(getattr(tensor, "ds_shape", tensor.shape))
            shape, rectangle, split = _placed(layer, relative, local)
            yield LogicalTensor(
                name=f"{name}.{relative}",
                shape=shape,
                rectangle=rectangle,
                tensor=tensor,
                trained=tensor.dtype != torch.uint8,
                decay=len(shape) > 1,
                adapter=id(tensor) in adapter_ids,
                split=split,
                owned=(split or _place(layer).rank == 0) and not getattr(layer, "is_copy", False),
            )


def _place(layer: nn.Module) -> TensorPlace:
    return getattr(layer, "place", TensorPlace())


def _placed(layer: nn.Module, relative: str, local: tuple[int, ...]) -> tuple[tuple[int, ...], Rectangle, bool]:
    """Global shape, this rank's rectangle of it, and whether it is a part."""
    place = _place(layer)
    split_dim: Callable[[str], int | None] | None = getattr(layer, "split_dim", None)
    dim = split_dim(relative) if split_dim is not None and place.ranks > 1 else None
    if dim is None:
        return local, whole(local), False
    total = local[dim] * place.ranks
    used = getattr(layer, "rows", total)
    start, stop = (min(bound, used) for bound in place.share(total))
    shape, rectangle = list(local), list(whole(local))
    shape[dim], rectangle[dim] = used, (start, stop)
    return tuple(shape), tuple(rectangle), True
