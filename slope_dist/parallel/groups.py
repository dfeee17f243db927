"""The process groups of a layout: Megatron-core's, and what DeepSpeed asks of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from slope_dist.parallel.layout import Layout, Position

ORDER = "tp-dp-pp"


@dataclass(frozen=True)
class Groups:
    """Process groups of this rank.

    Attributes:
        layout: ranks along each axis.
        position: this rank's place.
        tensor: ranks that share this rank's layers; None where there is one.
        data: ranks with the same part of the model.
        pipeline: the stages of this rank's replica; None where there is one.
        model: all ranks of this rank's replica, tensor x pipeline; None where there is one.
    """

    layout: Layout
    position: Position
    tensor: dist.ProcessGroup | None
    data: dist.ProcessGroup
    pipeline: dist.ProcessGroup | None
    model: dist.ProcessGroup | None


def start(layout: Layout) -> Groups:
    """Make the groups, once in a process. Collective; the default group exists and has the layout's size.

    Raises:
        ValueError: if it has another.
    """
    if dist.get_world_size() != layout.world_size:
        raise ValueError(f"{layout} has {layout.world_size} ranks, the process group {dist.get_world_size()}")
    position = layout.position(dist.get_rank())
    if layout.tensor == layout.pipeline == 1:
        assert dist.group.WORLD is not None
        return Groups(layout, position, None, dist.group.WORLD, None, None)
    # Seconds to import, and of no use to a run without tensor or pipeline ranks.
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            layout.tensor, layout.pipeline, order=ORDER, create_gloo_process_groups=False
        )
    sizes = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    if sizes != (layout.tensor, layout.data, layout.pipeline):
        raise ValueError(f"this process already has groups of another layout: {sizes}")
    return Groups(
        layout,
        position,
        parallel_state.get_tensor_model_parallel_group() if layout.tensor > 1 else None,
        parallel_state.get_data_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group() if layout.pipeline > 1 else None,
        parallel_state.get_model_parallel_group(),
    )


class ModelParallelUnit:
    """What DeepSpeed calls an mpu: Megatron-core's groups under the names it asks for. For tensor ranks only."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def get_model_parallel_rank(self) -> int:
        """This rank among those that share a replica."""
        return self._groups.position.tensor

    def get_model_parallel_world_size(self) -> int:
        """Ranks of a replica."""
        return self._groups.layout.tensor

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """The ranks of this replica."""
        return self._groups.tensor

    def get_data_parallel_rank(self) -> int:
        """This rank among those with the same part of the model."""
        return self._groups.position.data

    def get_data_parallel_world_size(self) -> int:
        """Ranks with the same part of the model."""
        return self._groups.layout.data

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks with the same part of the model."""
        return self._groups.data
