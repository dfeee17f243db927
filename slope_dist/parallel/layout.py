"""Arithmetic of a layout: which rank is what, and which layers a pipeline stage holds. No process groups.

Ranks are numbered tensor first, then data, then pipeline: the order of Megatron-core's "tp-dp-pp" and of DeepSpeed's
PipeModelDataParallelTopology, so that tensor ranks, which speak most, are neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """A rank's place on each axis."""

    tensor: int
    data: int
    pipeline: int


@dataclass(frozen=True)
class Layout:
    """Ranks along each axis."""

    tensor: int = 1
    data: int = 1
    pipeline: int = 1

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.tensor * self.data * self.pipeline

    def position(self, rank: int) -> Position:
        """Where a global rank stands."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} of {self.world_size}")
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Position(tensor, data, pipeline)

    def rank(self, position: Position) -> int:
        """The global rank at a position."""
        return (position.pipeline * self.data + position.data) * self.tensor + position.tensor


def stage_bounds(weights: Sequence[int], stages: int) -> list[int]:
    """Cut layers into consecutive stages so that the heaviest stage is as light as can be.

    Args:
        weights: parameters of each layer: the embedding, the blocks, the head. Adapters must not be among them, lest
            they move a layer at the switch.
        stages: how many; every stage gets at least one block.

    Returns:
        `stages` + 1 bounds: stage s holds layers [bounds[s], bounds[s + 1]). Of several best cuts, the one with the
        lightest later stages, which is the same on every rank.

    Raises:
        ValueError: if there are fewer blocks than stages.
    """
    blocks = len(weights) - 2
    if blocks < stages:
        raise ValueError(f"{blocks} blocks cannot fill {stages} stages")
    if stages == 1:
        return [0, len(weights)]
    # The first stage holds the embedding beside its blocks and the last the head, so cuts lie between blocks.
    units = [weights[0] + weights[1], *weights[2:-2], weights[-2] + weights[-1]]
    low, high = max(max(units), -(-sum(units) // stages)), sum(units)
    while low < high:
        limit = (low + high) // 2
        if _needed(units, limit) <= stages:
            high = limit
        else:
            low = limit + 1
    return [0, *(cut + 1 for cut in _fill(units, low, stages)), len(weights)]


def _needed(units: Sequence[int], limit: int) -> int:
    """Fewest stages of at most `limit`."""
    count, load = 1, 0
    for unit in units:
        if load + unit > limit:
            count, load = count + 1, 0
        load += unit
    return count


def _fill(units: Sequence[int], limit: int, stages: int) -> list[int]:
    """Inner cuts of stages filled up to `limit` from the front, leaving at least one unit for each that follows."""
    cuts: list[int] = []
    load = 0
    for index, unit in enumerate(units):
        left = stages - 1 - len(cuts)
        if index and left and (load + unit > limit or len(units) - index == left):
            cuts.append(index)
            load = 0
        load += unit
    return cuts
