"""One pipeline stage as DeepSpeed's PipelineModule: our boundaries, our layers, one tied table, a quiet stdout.

Imported only where there are stages, and after `import_deepspeed`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slope_dist.parallel import collectives
from slope_dist.parallel.groups import Groups
from slope_dist.parallel.regions import TensorPlace


class _Made(LayerSpec):
    """A layer that is there already; None stands for one of another stage."""

    def __init__(self, layer: nn.Module | None) -> None:
        super().__init__(nn.Module)
        self.layer = layer

    def build(self, log: bool = False) -> nn.Module | None:
        return self.layer


class _MadeAndTied(TiedLayerSpec):
    """As `_Made`, of a layer that holds the table called `name`."""

    def __init__(self, name: str, layer: nn.Module | None) -> None:
        paths = [] if layer is None else [_path(layer, name)]
        # The key becomes a module's name, which holds no dots.
        super().__init__(name.replace(".", "/"), nn.Module, tied_weight_attr=paths)
        self.layer = layer

    def build(self, log: bool = False) -> nn.Module | None:
        return self.layer


@dataclass
class _TiedGradient:
    """What DeepSpeed is shown in a tied parameter's place: the gradient, under both names it looks for."""

    grad: Tensor

    @property
    def _hp_grad(self) -> Tensor:
        return self.grad


class StageModule(PipelineModule):
    """This rank's layers, made and on the rank's device. Collective.

    Args:
        builders: what makes the embedding, the blocks and the head, in order; only this stage's are called.
        loss: from the head's output and the labels to a scalar.
        bounds: stage s holds layers [bounds[s], bounds[s + 1]).
        groups: process groups of the layout.
        recompute: run blocks again in backward instead of keeping their activations.

    Attributes:
        sequence_parallel: whether what passes between stages is this tensor rank's part of the sequence.
    """

    def __init__(
        self,
        builders: Sequence[Callable[[], nn.Module]],
        loss: Callable[[Tensor, Tensor], Tensor],
        bounds: Sequence[int],
        groups: Groups,
        *,
        recompute: bool,
    ) -> None:
        layout, stage = groups.layout, groups.position.pipeline
        own = {index: builders[index]() for index in range(bounds[stage], bounds[stage + 1])}
        layers: list[Any] = [own.get(index, _Made(None)) for index in range(len(builders))]
        copies = [module for layer in own.values() for module in layer.modules() if getattr(module, "is_copy", False)]
        # A head says only where it is whether it has a table of its own or a copy of the first stage's.
        names = {name for found in collectives.all_gather_json([copy.name for copy in copies]) for name in found}
        for name in names:
            layers[0], layers[-1] = (_MadeAndTied(name, own.get(index)) for index in (0, len(builders) - 1))
        self._bounds = list(bounds)
        self._data_ranks = layout.data
        self._data_group = groups.data
        topology = PipeModelDataParallelTopology(num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data)
        # DeepSpeed prints the topology and the stages, and broadcasts the table as if that were to be differentiated.
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            super().__init__(
                layers,
                topology=topology,
                loss_fn=loss,
                activation_checkpoint_interval=1 if recompute else 0,
                activation_checkpoint_func=partial(checkpoint, use_reentrant=False),
            )
        self._blocks = {id(layer) for index, layer in own.items() if 0 < index < len(builders) - 1}
        self.sequence_parallel = any(place.sequence_parallel for layer in own.values() for place in _places(layer))
        # DeepSpeed leaves all of the tied layer out of the gradient norm, the head's own norm with it.
        copied = {id(copy.weight) for copy in copies}
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = id(parameter) in copied

    def get_tied_weights_and_groups(self) -> list[tuple[_TiedGradient, dist.ProcessGroup]]:
        """Asked for by DeepSpeed's engine when it is about to sum the tied gradients over stages.

        It looks for them where fp16 does not accumulate them, and sums before the data ranks do. Sums of more than two
        terms depend on their order, which differs between the stages' places in their buffers, and the copies would
        drift apart: so the data ranks are averaged first, and what DeepSpeed averages later is equal on all of them.
        """
        pairs = []
        for weight, group in super().get_tied_weights_and_groups():
            places = (getattr(weight, name, None) for name in ("_hp_grad", "grad_accum", "grad"))
            gradient = next(found for found in places if found is not None)
            if self._data_ranks > 2:
                dist.all_reduce(gradient, group=self._data_group)
                gradient /= self._data_ranks
            pairs.append((_TiedGradient(gradient), group))
        return pairs

    def made_groups(self) -> list[dist.ProcessGroup]:
        """The process groups of this rank that DeepSpeed has made for this module alone."""
        grid = self._grid
        groups = [self.world_group, grid.ds_model_proc_group, grid.dp_proc_group, grid.pp_proc_group]
        groups += [grid.slice_proc_group, *(tied["group"] for tied in self.tied_comms.values())]
        return groups

    def _partition_layers(self, method: str = "") -> None:
        stage = self._topo.get_coord(self.global_rank).pipe
        self.parts = self._bounds
        self._set_bounds(self.parts[stage], self.parts[stage + 1])

    def _is_checkpointable(self, layers: Sequence[nn.Module]) -> bool:
        return all(id(layer) in self._blocks for layer in layers)


def _places(layer: nn.Module) -> Iterator[TensorPlace]:
    """Of all layers in it that have one."""
    for module in layer.modules():
        place = getattr(module, "place", None)
        if isinstance(place, TensorPlace):
            yield place


def _path(layer: nn.Module, name: str) -> str:
    """Where in a layer the table called `name` is."""
    return next(f"{path}.weight" for path, module in layer.named_modules() if getattr(module, "name", None) == name)
