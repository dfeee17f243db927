"""Where each ZeRO stage of DeepSpeed keeps a rank's share of the state, as fragments of logical tensors.

Uses the attributes of DeepSpeed 0.19's optimizers that hold fp32 partitions; nothing of DeepSpeed is patched.

| stage                | fp32 truth                                          | the model's copy                    |
| 0 (fp32)             | the parameters themselves                           | the same memory                     |
| 1, 2                 | `single_partition_of_fp32_groups[group]`            | slice of the whole parameter        |
| 1 with bf16          | `fp32_groups_flat_partition[group]`                 | slice of the whole parameter        |
| 3                    | `fp32_partitioned_groups_flat[sub-group]`           | `parameter.ds_tensor`               |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slope_dist.engine.optimizer import AdamW
from slope_dist.layers import LogicalTensor
from slope_dist.parallel.fragments import Fragment, Kind, rectangle_size


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of one trained tensor on this rank: fp32 truth, moments and the model's own copy."""

    start: int
    stop: int
    truth: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    model: Tensor
    write: bool


def _shares(size: int, ranks: int) -> list[tuple[int, int]]:
    """Cut [0, size) into `ranks` nearly equal ranges: how replicated state is divided for writing."""
    return [(size * rank // ranks, size * (rank + 1) // ranks) for rank in range(ranks)]


class ZeroState(ABC):
    """State of one rank at one ZeRO stage."""

    def __init__(self, engine: Any, adam: AdamW, tensors: list[LogicalTensor], data_rank: int, data_ranks: int) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer
        self.adam = adam
        self.tensors = tensors
        self.data_rank = data_rank
        self.data_ranks = data_ranks

    @abstractmethod
    def flat_parameters(self) -> dict[str, list[Tensor]]:
        """The tensors Adam steps on, by parameter group."""

    @abstractmethod
    def pieces(self, tensor: LogicalTensor) -> Iterator[Piece]:
        """This rank's pieces of a trained tensor."""

    @abstractmethod
    def sync(self) -> None:
        """Make the model's copies follow the fp32 truth, after a load. Collective."""

    def metadata(self, tensor: LogicalTensor) -> Iterator[tuple[int, int, Tensor, bool]]:
        """This rank's (start, stop, memory, write) of a metadata tensor; replicated below stage 3."""
        flat = tensor.tensor.view(-1)
        for rank, (start, stop) in enumerate(_shares(rectangle_size(tensor.rectangle), self.data_ranks)):
            yield start, stop, flat[start:stop], rank == self.data_rank

    def fragments(self) -> Iterator[Fragment]:
        """All of this rank's state."""
        for tensor in self.tensors:
            if not tensor.trained:
                for start, stop, memory, write in self.metadata(tensor):
                    if stop > start:
                        yield self._fragment(tensor, "metadata", start, stop, memory, write)
                continue
            for piece in self.pieces(tensor):
                states: list[tuple[Kind, Tensor]] = [("exp_avg", piece.exp_avg), ("exp_avg_sq", piece.exp_avg_sq)]
                if piece.model.dtype == torch.float32:
                    states.append(("weight", piece.truth))
                else:
                    states += [("master", piece.truth), ("weight", piece.model)]
                for kind, memory in states:
                    derived = memory is piece.model and piece.model.dtype != torch.float32
                    yield self._fragment(tensor, kind, piece.start, piece.stop, memory, piece.write, derived)

    def held(self) -> Iterator[Fragment]:
        """See `Engine.held`: weights and metadata are whole on this rank, the rest is as in `fragments`."""
        for tensor in self.tensors:
            size = rectangle_size(tensor.rectangle)
            memory = tensor.tensor.data.view(-1)[:size]
            yield self._fragment(tensor, "weight" if tensor.trained else "metadata", 0, size, memory, tensor.owned)
        yield from (fragment for fragment in self.fragments() if fragment.kind not in ("weight", "metadata"))

    @staticmethod
    def _fragment(
        tensor: LogicalTensor, kind: Kind, start: int, stop: int, memory: Tensor, write: bool, derived: bool = False
    ) -> Fragment:
        write = write and tensor.owned
        return Fragment(tensor.name, kind, tensor.shape, tensor.rectangle, start, stop, memory.detach(), write, derived)


class WholeState(ZeroState):
    """Stage 0 in fp32: every rank holds everything; for writing, each takes a share."""

    def flat_parameters(self) -> dict[str, list[Tensor]]:
        """The model's parameters."""
        return {group["name"]: group["params"] for group in self.adam.param_groups}

    def pieces(self, tensor: LogicalTensor) -> Iterator[Piece]:
        """One piece a data rank, all of them on every rank."""
        state = self.adam.state[tensor.tensor]
        flat = tensor.tensor.data.view(-1)
        exp_avg, exp_avg_sq = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        for rank, (start, stop) in enumerate(_shares(rectangle_size(tensor.rectangle), self.data_ranks)):
            if stop > start:
                part = slice(start, stop)
                yield Piece(
                    start, stop, flat[part], exp_avg[part], exp_avg_sq[part], flat[part], rank == self.data_rank
                )

    def sync(self) -> None:
        """Nothing to do: the model's parameters are the truth."""


class PartitionedState(ZeroState):
    """Stages 1 and 2, and bf16's optimizer at stage 1: flat fp32 partitions, whole parameters."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        bf16 = hasattr(self.optimizer, "fp32_groups_flat_partition")
        self.partitions: list[Tensor] = (
            self.optimizer.fp32_groups_flat_partition if bf16 else self.optimizer.single_partition_of_fp32_groups
        )

    def flat_parameters(self) -> dict[str, list[Tensor]]:
        """One flat partition a group."""
        names = [group["name"] for group in self.adam.param_groups]
        return {name: [partition] for name, partition in zip(names, self.partitions, strict=True)}

    def pieces(self, tensor: LogicalTensor) -> Iterator[Piece]:
        """At most one: where the parameter's flat range meets this rank's partition."""
        mapping = tensor.tensor._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return
        partition = self.partitions[mapping.param_group_index]
        state = self.adam.state[partition]
        start = mapping.lp_fragment_address.start
        size = min(start + mapping.lp_fragment_address.numel, rectangle_size(tensor.rectangle)) - start
        if size <= 0:
            return
        part = slice(mapping.hp_fragment_address.start, mapping.hp_fragment_address.start + size)
        yield Piece(
            start,
            start + size,
            partition.data[part],
            state["exp_avg"][part],
            state["exp_avg_sq"][part],
            tensor.tensor.data.view(-1)[start : start + size],
            True,
        )

    def sync(self) -> None:
        """Cast each partition into the model and gather the others'."""
        self.optimizer.update_lp_params()


class ShardedState(ZeroState):
    """Stage 3: parameters and metadata are sharded, each padded to a multiple of the data ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.places: dict[int, tuple[Tensor, int]] = {}
        for group, partition in zip(
            self.optimizer.fp16_groups, self.optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            offset = 0
            for parameter in group:
                self.places[id(parameter)] = (partition, offset)
                offset += parameter.ds_tensor.ds_numel
        self.by_parameter = {id(tensor.tensor): tensor for tensor in self.tensors}

    def flat_parameters(self) -> dict[str, list[Tensor]]:
        """The flat sub-group partitions of each group."""
        names = [group["name"] for group in self.adam.param_groups]
        flat: dict[str, list[Tensor]] = {name: [] for name in names}
        for index, partition in enumerate(self.optimizer.fp32_partitioned_groups_flat):
            flat[names[self.optimizer.sub_group_to_group_id[index]]].append(partition)
        return flat

    def _range(self, tensor: LogicalTensor) -> tuple[int, int]:
        share = tensor.tensor.ds_tensor.ds_numel  # type: ignore[attr-defined]
        size = rectangle_size(tensor.rectangle)
        start = min(self.data_rank * share, size)
        return start, min(start + share, size)

    def pieces(self, tensor: LogicalTensor) -> Iterator[Piece]:
        """This rank's share, without its padding."""
        start, stop = self._range(tensor)
        if stop == start:
            return
        partition, offset = self.places[id(tensor.tensor)]
        part = slice(offset, offset + stop - start)
        state = self.adam.state[partition]
        model = tensor.tensor.ds_tensor.data.view(-1)[: stop - start]  # type: ignore[attr-defined]
        yield Piece(start, stop, partition.data[part], state["exp_avg"][part], state["exp_avg_sq"][part], model, True)

    def metadata(self, tensor: LogicalTensor) -> Iterator[tuple[int, int, Tensor, bool]]:
        """This rank's share of the sharded metadata."""
        start, stop = self._range(tensor)
        yield start, stop, tensor.tensor.ds_tensor.data.view(-1)[: stop - start], True  # type: ignore[attr-defined]

    def held(self) -> Iterator[Fragment]:
        """Shares, and of several ranks also the small parameters that are kept whole."""
        yield from self.fragments()
        for parameter in self.optimizer.persistent_parameters if self.data_ranks > 1 else ():
            tensor = self.by_parameter.get(id(parameter))
            size = 0 if tensor is None else rectangle_size(tensor.rectangle)
            if tensor is not None and parameter.numel() >= size:
                memory = parameter.data.view(-1)[:size]
                yield self._fragment(tensor, "weight" if tensor.trained else "metadata", 0, size, memory, False)

    def sync(self) -> None:
        """Cast each partition into the parameters' shards, and gather anew the small ones that are kept whole."""
        for index in range(len(self.optimizer.fp16_groups)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if self.optimizer.persistent_parameters:
            self.optimizer.persistent_parameters[0].all_gather(self.optimizer.persistent_parameters)


def zero_state(
    stage: int, engine: Any, adam: AdamW, tensors: list[LogicalTensor], data_rank: int, data_ranks: int
) -> ZeroState:
    """The state of an initialised DeepSpeed engine."""
    kind = {0: WholeState, 1: PartitionedState, 2: PartitionedState, 3: ShardedState}[stage]
    return kind(engine, adam, tensors, data_rank, data_ranks)
