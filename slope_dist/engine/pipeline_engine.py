"""The engine on DeepSpeed's pipeline: stages x data ranks x tensor ranks, ZeRO 0 and 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slope_dist.engine.deepspeed_engine import DeepSpeedEngine, LayerCaster, guarded, import_deepspeed
from slope_dist.engine.interface import MicroBatch, StepResult
from slope_dist.engine.optimizer import OptimizerSettings, parameter_groups
from slope_dist.layers import LogicalTensor
from slope_dist.parallel import collectives
from slope_dist.parallel.groups import Groups
from slope_dist.parallel.layout import Position

_TIMER = "train_batch"


def _cast(make: Callable[[], nn.Module], caster: LayerCaster) -> nn.Module:
    layer = make()
    caster(layer)
    return layer


class PipelineEngine(DeepSpeedEngine):
    """See `Engine`. All ranks call `train_step`, `evaluate`, `load_state` and `close` together.

    Ranks of one replica are given the same micro-batches; losses are the same on each of them.

    Args:
        builders: what makes the embedding, the blocks and the head, in order; a rank calls those of its stage.
        loss: from the head's output and the labels to a scalar.
        bounds: stage s holds layers [bounds[s], bounds[s + 1]).
        groups: process groups of the layout, with at least two stages.
        settings: DeepSpeed's dictionary, derived from the config.
        optimizer: AdamW's numbers.
        column_mask_interval: steps between refreshes of held column masks.
        recompute: run blocks again in backward instead of keeping their activations.
    """

    def __init__(
        self,
        builders: Sequence[Callable[[], nn.Module]],
        loss: Callable[[Tensor, Tensor], Tensor],
        bounds: Sequence[int],
        groups: Groups,
        settings: dict[str, Any],
        optimizer: OptimizerSettings,
        *,
        column_mask_interval: int,
        recompute: bool,
    ) -> None:
        deepspeed = import_deepspeed()
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist_init_required=False)
        from slope_dist.engine.pipeline_module import StageModule

        stage = StageModule(
            [partial(_cast, make, LayerCaster(settings)) for make in builders],
            lambda logits, labels: guarded(loss(logits, labels)),
            bounds,
            groups,
            recompute=recompute,
        )
        # DeepSpeed sends the first tensor rank's part of what it takes to be equal on all of them, the second's, ...
        partitioned = not stage.sequence_parallel
        settings = settings | {"pipeline": {"pipe_partitioned": partitioned, "grad_partitioned": partitioned}}
        super().__init__(lambda _: stage, groups, settings, optimizer, column_mask_interval=column_mask_interval)

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """All micro-batches through all stages, and one guarded update."""
        scale_before = self._loss_scale()
        self._make_transposes()
        loss = self._engine.train_batch(iter(micro_batches))
        self._forget()
        self._values_changed()
        return StepResult(float(loss), float(self._engine.get_global_grad_norm()), self._skip(scale_before))

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> Tensor:
        """Mean loss of the batch, the same on every rank of the replica: fp32 scalar, NaN where no label counts."""
        # DeepSpeed's own mean over data ranks would let one whose labels are all ignored spoil the others.
        losses = self._engine.eval_batch(iter([batch]), reduce_output=None, bcast_loss=False, num_micro_batches=1)
        self._forget()
        last = self._groups.layout.pipeline - 1
        position = self._groups.position
        loss = torch.zeros((), device=self._engine.device)
        if position.pipeline == last:
            loss.copy_(losses[0])
        source = self._groups.layout.rank(Position(position.tensor, position.data, last))
        dist.broadcast(loss, source, group=self._groups.pipeline)
        return loss

    def close(self) -> None:
        """Release parameters, optimizer, hooks and process groups."""
        groups = self._engine.module.made_groups()
        super().close()
        for group in groups:
            dist.destroy_process_group(group)

    def _forget(self) -> None:
        """Drop what DeepSpeed leaves behind: times that nobody asks for, and on the last stage its logits.

        These have a graph, by whose hooks, out of sight of the garbage collector, they keep the engine alive.
        """
        engine = self._engine
        engine.timers(_TIMER).reset()
        engine.loss = None
        for slots in engine.pipe_buffers.values():
            slots[:] = [None] * len(slots)

    def _unit(self, groups: Groups) -> None:
        """DeepSpeed takes the groups of a pipeline from its module."""

    def _parameter_groups(
        self, model: nn.Module, tensors: list[LogicalTensor], optimizer: OptimizerSettings
    ) -> list[dict[str, Any]]:
        """The same groups on every stage: DeepSpeed takes norms by group, over all of them together."""
        parameters = parameter_groups(tensors, optimizer)
        adapters = parameters[-1]["name"] == "adapters"
        if any(collectives.all_gather_json(adapters)) and not adapters:
            # No layer of this stage has one. It is never used, counted or saved.
            nothing = nn.Parameter(torch.zeros(1, device=next(model.parameters()).device))
            nothing.ds_pipe_replicated = True  # type: ignore[attr-defined]
            model.register_parameter("no_adapters", nothing)
            parameters.append({"name": "adapters", "params": [nothing], "weight_decay": 0.0})
        return parameters
