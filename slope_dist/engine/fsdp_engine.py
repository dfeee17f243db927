"""The engine on FSDP2 of torch: parameters, metadata, gradients and optimizer state split by rows over data ranks.

A block is gathered for its forward, again for its backward, and freed after each; what the embedding and the head hold
(the token table is one parameter of both) is gathered once for both. The fp32 shards are the masters. Tensor ranks need
nothing here: what FSDP cuts by rows is the part of a layer that is this tensor rank's.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from slope_dist.engine.interface import MicroBatch, StepResult, moved
from slope_dist.engine.loading import index_patterns, load_fragments, load_steps, saved_steps
from slope_dist.engine.optimizer import GuardedAdamW, OptimizerSettings, mean_over_ranks, parameter_groups
from slope_dist.errors import UserError
from slope_dist.layers import LogicalTensor, logical_tensors
from slope_dist.parallel import collectives
from slope_dist.parallel.fragments import Fragment, Kind, StateSource, rectangle_size
from slope_dist.parallel.groups import Groups
from slope_dist.sparse import SparseWeight
from slope_dist.transfer import Transfer


@dataclass(frozen=True)
class RowShard:
    """This rank's rows of one tensor.

    Attributes:
        tensor: the logical tensor; its live tensor is FSDP's sharded parameter.
        rows: the rows as an ordinary parameter over FSDP's own memory; none where there are fewer rows than ranks.
        first_row: the first of them in this tensor rank's part.
    """

    tensor: LogicalTensor
    rows: nn.Parameter
    first_row: int

    @property
    def last_row(self) -> int:
        """One past the last."""
        return self.first_row + self.rows.shape[0]

    @property
    def range(self) -> tuple[int, int]:
        """Elements [start, stop) of the tensor's rectangle; rows that pad a vocabulary lie beyond it."""
        size, row = rectangle_size(self.tensor.rectangle), self.rows.shape[1:].numel()
        return min(self.first_row * row, size), min(self.last_row * row, size)


class LayerSharder:
    """Shards a model's layers as they are made, so that no two blocks are ever whole.

    The first layer, and those that use a parameter of it, stay whole until `finish`: they are one unit, so that the
    parameter is gathered once for all who use it, and the last of them is not made before then.

    Args:
        mesh: the data ranks.
        policy: dtypes of computation and reduction.
    """

    def __init__(self, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
        self._mesh = mesh
        self._policy = policy
        self._shared: dict[int, nn.Parameter] = {}
        self.units: list[FSDPModule] = []

    def __call__(self, layer: nn.Module) -> None:
        """Round a new layer's values to the dtype they are used in, and shard it."""
        parameters = {id(parameter): parameter for parameter in layer.parameters()}
        if self._policy.param_dtype is not None:
            for parameter in parameters.values():
                if parameter.is_floating_point():
                    # Engines that keep masters beside narrow weights begin with masters of the narrow values.
                    parameter.data.copy_(parameter.data.to(self._policy.param_dtype))
        if not self._shared or self._shared.keys() & parameters.keys():
            self._shared |= parameters
            return
        fully_shard(layer, mesh=self._mesh, mp_policy=self._policy, reshard_after_forward=True)
        self.units.append(cast(FSDPModule, layer))

    def finish(self, model: nn.Module) -> None:
        """Shard what is left, as the model's own unit: backward begins with it, so it stays whole after forward."""
        fully_shard(model, mesh=self._mesh, mp_policy=self._policy, reshard_after_forward=False)
        self.units.append(cast(FSDPModule, model))
        for parameter in self._shared.values():
            # Whoever still names the parameter that was cut must not keep it in memory.
            parameter.data = parameter.data.new_empty(0)
        self._shared.clear()


def check_torch() -> None:
    """Refuse sparse weights where this torch shards no integers, which their metadata are.

    Raises:
        UserError: naming what works.
    """
    release = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if release is not None and tuple(map(int, release.groups())) < (2, 12):
        raise UserError(
            f'parallel.engine "fsdp" cannot train sparse weights here: FSDP2 of torch {torch.__version__} shards no '
            'integers, as their metadata is; use torch 2.12 or later, or parallel.engine "deepspeed"'
        )


class FSDPEngine:
    """See `Engine`: data ranks and tensor ranks, everything sharded over the data ranks.

    Args:
        make_model: makes the model, which called with (tokens, labels) returns the mean loss. It is given a function
            to call with each layer before the next is made.
        groups: process groups of the layout.
        optimizer: AdamW's numbers.
        precision: dtype of weights and activations in forward and backward.
        gradient_dtype: dtype in which gradients are reduced; they are accumulated in fp32.
        column_mask_interval: steps between refreshes of held column masks.
    """

    def __init__(
        self,
        make_model: Callable[[Callable[[nn.Module], None]], nn.Module],
        groups: Groups,
        optimizer: OptimizerSettings,
        *,
        precision: Literal["bf16", "fp32"],
        gradient_dtype: Literal["fp32", "model"],
        column_mask_interval: int,
    ) -> None:
        self._groups = groups
        self._interval = column_mask_interval
        self._device = collectives.device()
        self._dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
        policy = MixedPrecisionPolicy()
        if self._dtype != torch.float32:
            reduced = torch.float32 if gradient_dtype == "fp32" else self._dtype
            policy = MixedPrecisionPolicy(param_dtype=self._dtype, reduce_dtype=reduced)
        sharder = LayerSharder(DeviceMesh.from_group(groups.data, self._device.type), policy)
        self.module: nn.Module = make_model(sharder)
        sharder.finish(self.module)
        self._units = sharder.units
        self._sparse = [module for module in self.module.modules() if isinstance(module, SparseWeight)]
        self._shards = [self._shard(tensor) for tensor in logical_tensors(self.module)]
        self._trained = [shard for shard in self._shards if shard.tensor.trained]
        self._patterns = index_patterns([shard.tensor for shard in self._shards], self._sparse)
        # Adam, norm and clipping see each rank's rows as the ordinary tensors that they are.
        self._adam = GuardedAdamW(
            parameter_groups([replace(shard.tensor, tensor=shard.rows) for shard in self._trained], optimizer),
            optimizer,
            counted={id(shard.rows) for shard in self._trained if shard.tensor.owned},
            # There is no pipeline: all ranks hold parts of one gradient.
            norm_group=dist.group.WORLD,
        )
        self._adam.reset_state(self.optimizer_parameters())

    def optimizer_parameters(self) -> dict[str, list[Tensor]]:
        """The tensors Adam steps on, by parameter group."""
        return {group["name"]: group["params"] for group in self._adam.param_groups}

    def begin_step(self, step: int) -> None:
        """Refresh held column masks where (step - 1) is a multiple of the interval (rule R2)."""
        if self._interval == 1 or (step - 1) % self._interval:
            return
        masks = {id(shard.tensor.tensor): shard for shard in self._shards if not shard.tensor.trained}
        seen: set[int] = set()
        for unit in self._units:
            # The model's own unit comes last, when the weights of the others have been seen.
            weights = [m for m in cast(nn.Module, unit).modules() if isinstance(m, SparseWeight) and id(m) not in seen]
            if not weights:
                continue
            seen |= {id(weight) for weight in weights}
            shards = [masks[id(weight.column_mask)] for weight in weights]
            # A mask is chosen within groups of rows, which the cuts between ranks do not respect.
            unit.unshard()
            for weight, shard in zip(weights, shards, strict=True):
                weight.refresh_column_mask()
                assert weight.column_mask is not None
                shard.rows.data.copy_(weight.column_mask[shard.first_row : shard.last_row])
            unit.reshard()

    def set_learning_rates(self, rates: Mapping[str, float]) -> None:
        """Set the rate of each group for the next step."""
        for group in self._adam.param_groups:
            group["lr"] = rates["adapters" if group["name"] == "adapters" else "base"]

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """Forward, backward and one guarded update."""
        self.module.train()
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for batch in micro_batches:
            loss = self.module(*moved(batch, self._device))
            total += loss.detach()
            # A loss that is not finite must not pass with gradients that are: the factor, which needs no host
            # sync, makes them agree, and the global norm carries it to every rank.
            factor = torch.where(torch.isfinite(loss.detach()), 1.0 / len(micro_batches), torch.nan)
            # Reduced into shards at once: whole gradients kept over micro-batches would be a whole model.
            (loss * factor.to(loss.dtype)).backward()
        for shard in self._trained:
            gradient = shard.tensor.tensor.grad
            shard.rows.grad = None if gradient is None else cast(DTensor, gradient).to_local()
            shard.tensor.tensor.grad = None
        self._adam.step()
        self._adam.zero_grad()
        self._values_changed()
        return StepResult(
            mean_over_ranks(total / len(micro_batches), self._groups.data),
            self._adam.grad_norm,
            "non-finite" if self._adam.overflow else None,
        )

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> Tensor:
        """Mean loss of this rank's batch. Collective: every rank calls it equally often."""
        self.module.eval()
        loss = self.module(*moved(batch, self._device))
        # Backward, which frees what the model's own unit has gathered, does not follow.
        self._units[-1].reshard()
        return loss

    def export_state(self) -> tuple[Iterable[Fragment], dict[str, Any]]:
        """Live fragments of this rank, and step counters by parameter group."""
        return self._fragments(), {"optimizer_steps": saved_steps(self._adam, self.optimizer_parameters())}

    def held(self) -> Iterable[Fragment]:
        """This rank's rows: the masters, not the weights that are made of them."""
        return self._fragments(derived=False)

    def load_state(self, source: StateSource, *, new_adapters: bool = False, transfer: Transfer | None = None) -> None:
        """Take over a state. Collective."""
        adapters = {shard.tensor.name for shard in self._shards if shard.tensor.adapter}
        load_fragments(
            source,
            self._fragments(derived=False),
            self._patterns,
            keep=adapters if new_adapters else (),
            transfer=transfer,
        )
        load_steps(source, self._adam, self.optimizer_parameters())
        self._indices_changed()

    def close(self) -> None:
        """Release parameters, optimizer and hooks."""
        del self.module, self._units, self._sparse, self._shards, self._trained, self._adam
        # FSDP's hooks and modules name each other.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _shard(self, tensor: LogicalTensor) -> RowShard:
        live = tensor.tensor
        rows = cast(DTensor, live.detach()).to_local()
        rank, ranks = dist.get_rank(self._groups.data), dist.get_world_size(self._groups.data)
        # FSDP cuts as torch.chunk does: equal parts, of which the last ones may be short or empty.
        part = -(-live.shape[0] // ranks)
        first, last = (min(bound * part, live.shape[0]) for bound in (rank, rank + 1))
        assert rows.shape[0] == last - first, (
            f"{tensor.name}: rank {rank} holds {rows.shape[0]} of {live.shape[0]} rows"
        )
        return RowShard(tensor, nn.Parameter(rows, requires_grad=tensor.trained), first)

    def _fragments(self, *, derived: bool = True) -> Iterator[Fragment]:
        for shard in self._shards:
            start, stop = shard.range
            if start == stop:
                continue
            flat = shard.rows.data.view(-1)[: stop - start]
            if not shard.tensor.trained:
                yield self._fragment(shard, "metadata", flat)
                continue
            state = self._adam.state[shard.rows]
            moments: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")
            for kind in moments:
                yield self._fragment(shard, kind, state[kind].view(-1)[: stop - start])
            if self._dtype == torch.float32:
                yield self._fragment(shard, "weight", flat)
            else:
                yield self._fragment(shard, "master", flat)
                if derived:
                    # Not kept: made of the master whenever a block is gathered, and now for those who read the state.
                    yield self._fragment(shard, "weight", flat.to(self._dtype), derived=True)

    @staticmethod
    def _fragment(shard: RowShard, kind: Kind, memory: Tensor, derived: bool = False) -> Fragment:
        tensor, (start, stop) = shard.tensor, shard.range
        return Fragment(
            tensor.name, kind, tensor.shape, tensor.rectangle, start, stop, memory.detach(), tensor.owned, derived
        )

    def _values_changed(self) -> None:
        for weight in self._sparse:
            weight.values_changed()

    def _indices_changed(self) -> None:
        for weight in self._sparse:
            weight.indices_changed()
