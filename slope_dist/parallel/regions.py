"""How activations pass between tensor ranks: the edges of the region in which layers are split.

Between split layers lies the residual stream. Without sequence parallelism every tensor rank holds all of it; with it,
each holds a part of the sequence, and the two all-reduces of a block become reduce-scatter and all-gather pairs.

| function       | forward                    | backward                   |
| enter_split    | as is / all-gather         | all-reduce / reduce-scatter |
| leave_split    | all-reduce / reduce-scatter | as is / all-gather         |
| enter_stream   | as is / own part           | as is / all-gather         |
| whole_parameter, whole_product | as is      | all-reduce                 |

Left: without, right: with sequence parallelism. Activations are [B, S, ...] and cut along S. The mappings without it
are Megatron-core's; its sequence-parallel ones need a GPU, so those are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

# torch 2.13 has new names for these, and warns of the old ones, which are all that torch before it has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class TensorPlace:
    """This rank among those that share a layer.

    Without a group a share can be laid out, counted and drawn, but not run.
    """

    rank: int = 0
    ranks: int = 1
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False

    def share(self, size: int) -> tuple[int, int]:
        """This rank's half-open range of a dimension that divides evenly.

        Raises:
            ValueError: if it does not.
        """
        if size % self.ranks:
            raise ValueError(f"{size} does not divide into {self.ranks} equal parts")
        part = size // self.ranks
        return self.rank * part, (self.rank + 1) * part


def enter_split(x: Tensor, place: TensorPlace) -> Tensor:
    """From the stream to the input of column-split layers, one for all that read it: -> [B, S, ...]."""
    if place.ranks == 1:
        return x
    if place.sequence_parallel:
        return _Mapping.apply(x, place, _gathered, _reduced_part)
    return _copy_to(x, place)


def leave_split(x: Tensor, place: TensorPlace) -> Tensor:
    """From the partial sums of a row-split layer, [B, S, ...], to the stream."""
    if place.ranks == 1:
        return x
    if place.sequence_parallel:
        return _Mapping.apply(x, place, _reduced_part, _gathered)
    from megatron.core.tensor_parallel import mappings

    # Megatron-core reduces in place, and loses the result for a tensor that is not contiguous.
    return mappings.reduce_from_tensor_model_parallel_region(x.contiguous(), group=place.group)


def enter_stream(x: Tensor, place: TensorPlace) -> Tensor:
    """From something that every rank holds whole, [B, S, ...], to the stream."""
    if place.ranks == 1 or not place.sequence_parallel:
        return x
    return _Mapping.apply(x, place, _own_part, _gathered)


def whole_parameter(parameter: Tensor, place: TensorPlace) -> Tensor:
    """A parameter that every tensor rank holds whole, used where each computes a part of its gradient.

    The parts are summed inside autograd, before any engine's hook sees the gradient. For vectors; a matrix takes
    `whole_product`.
    """
    return parameter if place.ranks == 1 else _copy_to(parameter, place)


def whole_product(x: Tensor, parameter: Tensor, place: TensorPlace) -> Tensor:
    """X W^T for a matrix W as in `whole_parameter`: [..., I] by [O, I] -> [..., O].

    What autograd keeps of W is the parameter itself. Through `whole_parameter` it would keep the memory of now, which
    where W is sharded over data ranks is a gathered copy, of every block until its backward.
    """
    return functional.linear(x, parameter) if place.ranks == 1 else _WholeProduct.apply(x, parameter, place)


def _copy_to(x: Tensor, place: TensorPlace) -> Tensor:
    from megatron.core.tensor_parallel import mappings

    # See `leave_split`: what reaches the all-reduce in backward must be contiguous.
    return _ContiguousGradient.apply(mappings.copy_to_tensor_model_parallel_region(x, group=place.group))


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


class _WholeProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor, place: TensorPlace) -> Tensor:
        ctx.save_for_backward(x, parameter)
        ctx.place = place
        return functional.linear(x, parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, parameter = ctx.saved_tensors
        grad_parameter = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        dist.all_reduce(grad_parameter, group=ctx.place.group)
        return grad @ parameter, grad_parameter, None


_Way = Callable[[Tensor, TensorPlace], Tensor]


def _gathered(x: Tensor, place: TensorPlace) -> Tensor:
    """Every rank's part of the sequence: [B, S / ranks, ...] -> [B, S, ...]."""
    parts = x.new_empty((place.ranks, *x.shape))
    _all_gather(parts.flatten(0, 1), x.contiguous(), group=place.group)
    return parts.movedim(0, 1).flatten(1, 2)


def _reduced_part(x: Tensor, place: TensorPlace) -> Tensor:
    """This rank's part of the sum over ranks: [B, S, ...] -> [B, S / ranks, ...]."""
    parts = x.unflatten(1, (place.ranks, -1)).movedim(1, 0).contiguous()
    out = torch.empty_like(parts[0])
    _reduce_scatter(out, parts.flatten(0, 1), group=place.group)
    return out


def _own_part(x: Tensor, place: TensorPlace) -> Tensor:
    start, stop = place.share(x.shape[1])
    return x[:, start:stop].contiguous()


class _Mapping(torch.autograd.Function):
    """One of the three ways between a sequence and its parts in forward, another in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: TensorPlace, there: _Way, back: _Way) -> Tensor:
        ctx.place, ctx.back = place, back
        return there(x, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(grad, ctx.place), None, None, None
