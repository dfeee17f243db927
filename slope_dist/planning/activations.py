"""Activations of a model's layers, by running the layers themselves on tensors without memory.

Forward and backward of the real layers run on fake tensors, and the storages are counted: what each layer leaves for
backward, and the most that there is while it runs. A model of any size takes a fraction of a second, for blocks are
alike: two are run, and the others follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from slope_dist.models.attention import forget_tables
from slope_dist.planning.storages import StorageCounter
from slope_dist.sparse import SparseWeight, codec, kernels


@dataclass(frozen=True)
class Layer:
    """One micro-batch through one layer, in bytes. Parameters and their gradients are not in it.

    Attributes:
        saved: what forward leaves for backward.
        forward: the most while forward runs, beyond what was there before.
        given: what backward is given, the gradient of the layer's output, beyond what forward has left.
        backward: the most while backward runs, beyond what was there before it, `given` included.
    """

    saved: int
    forward: int
    given: int
    backward: int


class PredictedTooLateError(RuntimeError):
    """Activations of tensor ranks cannot be predicted in a process that has a process group."""


@contextmanager
def tensor_ranks(ranks: int) -> Iterator[dist.ProcessGroup | None]:
    """The group of a first tensor rank, whose others are not there: collectives give tensors of the right sizes.

    Raises:
        PredictedTooLateError: this process has joined others.
    """
    if ranks == 1:
        yield None
        return
    from megatron.core import parallel_state

    if dist.is_initialized():
        raise PredictedTooLateError
    # Imported for the backend that it registers.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    before = parallel_state._TENSOR_MODEL_PARALLEL_GROUP
    # Megatron-core's loss asks there, and is told nowhere else.
    parallel_state._TENSOR_MODEL_PARALLEL_GROUP = dist.group.WORLD
    try:
        yield dist.group.WORLD
    finally:
        parallel_state._TENSOR_MODEL_PARALLEL_GROUP = before
        dist.destroy_process_group()


class KernelsOfGPUs:
    """In place of a dispatcher, on whose products nothing is computed: only shapes are asked for.

    Library's metadata is state, counted elsewhere, and so are resident transposes.
    """

    device = torch.device("cpu")

    def form(self, indices: Tensor, dtype: torch.dtype) -> str:
        """No vendor's."""
        return ""

    def metadata(self, indices: Tensor, dtype: torch.dtype) -> None:
        """None."""

    def lay(self, values: Tensor, indices: Tensor) -> tuple[Tensor, None]:
        """As it is."""
        return values, None

    def lay_transpose(self, values: Tensor, indices: Tensor, column_mask: Tensor | None) -> tuple[Tensor, Tensor, None]:
        """Its shapes."""
        return *torch.ops.slope_dist.transpose(values, indices, column_mask), None


def run_layers(
    layers: Sequence[nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    batch: int,
    length: int,
    dtype: torch.dtype,
    recompute: bool,
    on_gpu: bool,
    with_kernels: bool,
    widened: torch.dtype | None = None,
) -> list[Layer]:
    """Run embedding, blocks and head, in order, on one micro-batch.

    Args:
        layers: on the meta device; their parameters are given fake memory here.
        loss: from the head's output and the labels to a scalar.
        batch: sequences.
        length: tokens of one.
        dtype: of parameters and activations.
        recompute: whether backward runs the blocks again.
        on_gpu: whether it runs on a GPU, not on the CPU.
        with_kernels: whether 2:4 products are those of kernels, not of the reference.
        widened: what gradients are copied to as soon as they are there, where they are added up in another dtype.
    """
    memory = FakeTensorMode(allow_non_fake_inputs=True)
    blocks = codec.blocks_of_accelerators() if on_gpu else nullcontext()
    dispatcher: Any = KernelsOfGPUs() if with_kernels else None
    with _tables_apart(), kernels.using(dispatcher), blocks, memory:
        kept = [_give_memory(layer, memory, dtype, widened or dtype) for layer in layers]
        counter = StorageCounter()
        counter.ignore(tensor for tensors in kept for tensor in tensors)
        with counter:
            return _run(layers, loss, counter, batch, length, recompute)


def _run(
    layers: Sequence[nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor],
    counter: StorageCounter,
    batch: int,
    length: int,
    recompute: bool,
) -> list[Layer]:
    ids = torch.zeros(2, batch, length, dtype=torch.int64)
    forward, saved = [], []
    begun: dict[int, int] = {}
    most: dict[int, int] = {}

    def begin(index: int, _: Tensor | None = None) -> None:
        if begun:
            most[min(begun)] = counter.peak
        counter.restart()
        begun[index] = counter.bytes

    last = len(layers) - 1
    hidden = ids[0]
    for index, layer in enumerate(layers):
        layer.train()
        counter.restart()
        before = counter.bytes
        again = recompute and 0 < index < last
        hidden = checkpoint(layer, hidden, use_reentrant=False) if again else layer(hidden)
        if index == last:
            hidden = loss(hidden, ids[1])
        else:
            hidden.register_hook(partial(begin, index))
        forward.append(counter.peak - before)
        saved.append(counter.bytes - before)
    begin(last)
    hidden.backward()
    most[0] = counter.peak
    found = []
    for index in range(len(layers)):
        held = sum(saved[: index + 1])
        given = max(0, begun[index] - held)
        found.append(Layer(saved[index], forward[index], given, most[index] - held))
    return found


def _give_memory(
    layer: nn.Module, memory: FakeTensorMode, dtype: torch.dtype, gradient_dtype: torch.dtype
) -> list[Tensor]:
    """Fake tensors, of which gradients are let go as soon as they are there, in place of a layer's meta tensors."""

    def let_go(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.to(gradient_dtype)
        parameter.grad = None

    made: list[Tensor] = []
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or isinstance(parameter, FakeTensor):
                continue
            known = getattr(parameter, "_given_memory", None)
            if known is None:
                known = nn.Parameter(_fake(parameter, memory, dtype), requires_grad=parameter.requires_grad)
                if known.requires_grad:
                    known.register_post_accumulate_grad_hook(let_go)
                # A table that head and embedding share stays one.
                parameter._given_memory = known  # type: ignore[attr-defined]
                made.append(known)
            module._parameters[name] = known
        for name, buffer in module._buffers.items():
            if buffer is not None:
                made.append(_fake(buffer, memory, dtype))
                module._buffers[name] = made[-1]
        if isinstance(module, SparseWeight) and module.resident_transpose:
            # Made before the blocks run, and counted with the weights.
            module.transpose()
            made += module.cached_tensors()
    return made


def _fake(tensor: Tensor, memory: FakeTensorMode, dtype: torch.dtype) -> Tensor:
    plain = tensor.detach()
    if plain.is_floating_point():
        plain = plain.to(dtype)
    return FakeTensor(memory, plain, torch.device("cpu"))


@contextmanager
def _tables_apart() -> Iterator[None]:
    """What layers keep for all calls must not be made of fake tensors, nor fake tensors be counted as made before."""
    forget_tables()
    try:
        yield
    finally:
        forget_tables()
