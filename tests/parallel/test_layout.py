"""Ranks have one place each, in the order of Megatron-core and DeepSpeed; stages are the best cut between blocks.

Run: pytest tests/parallel/test_layout.py
"""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from slope_dist.parallel.layout import Layout, Position, stage_bounds


def test_ranks_are_numbered_tensor_first_then_data_then_pipeline() -> None:
    layout = Layout(tensor=2, data=3, pipeline=2)
    assert layout.world_size == 12
    assert [layout.position(rank) for rank in range(12)] == [
        Position(tensor, data, stage) for stage in range(2) for data in range(3) for tensor in range(2)
    ]
    assert [layout.rank(layout.position(rank)) for rank in range(12)] == list(range(12))


def test_order_is_that_of_megatron_core_and_deepspeed() -> None:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
    from megatron.core.parallel_state import RankGenerator

    from slope_dist.parallel.groups import ORDER

    layout = Layout(tensor=2, data=3, pipeline=4)
    topology = PipeModelDataParallelTopology(num_pp=4, num_mp=2, num_dp=3)
    for rank in range(layout.world_size):
        place, position = topology.get_coord(rank), layout.position(rank)
        assert (place.model, place.data, place.pipe) == (position.tensor, position.data, position.pipeline)
    generator = RankGenerator(tp=2, ep=1, dp=3, pp=4, cp=1, order=ORDER)
    for axis, attribute in (("tp", "tensor"), ("dp", "data"), ("pp", "pipeline")):
        for group in generator.get_ranks(axis):
            positions = [layout.position(rank) for rank in group]
            assert [getattr(position, attribute) for position in positions] == list(range(len(group)))


@pytest.mark.parametrize("rank", [-1, 4])
def test_rank_outside_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of 4"):
        Layout(tensor=2, data=2).position(rank)


def loads(weights: list[int], bounds: list[int]) -> list[int]:
    return [sum(weights[start:stop]) for start, stop in pairwise(bounds)]


def all_bounds(layers: int, stages: int) -> list[list[int]]:
    """Every cut that leaves each stage a block: the embedding goes with the first, the head with the last."""
    return [[0, *cuts, layers] for cuts in combinations(range(2, layers - 1), stages - 1)]


def test_heaviest_stage_is_as_light_as_can_be() -> None:
    draw = random.Random(11)
    for _ in range(400):
        blocks = draw.randrange(1, 8)
        stages = draw.randrange(1, blocks + 1)
        weights = [
            draw.choice([0, 1, 5, 30, 200]),
            *(draw.randrange(1, 20) for _ in range(blocks)),
            draw.choice([1, 90]),
        ]
        found = stage_bounds(weights, stages)
        candidates = all_bounds(len(weights), stages)
        assert found in candidates, (weights, stages)
        best = min(max(loads(weights, bounds)) for bounds in candidates)
        assert max(loads(weights, found)) == best, (weights, stages, found)
        # Of several best, the one whose later stages are lightest: with the last cuts as late as they can be.
        ties = [bounds for bounds in candidates if max(loads(weights, bounds)) == best]
        assert found == max(ties), (weights, stages, found)


@pytest.mark.parametrize(
    ("weights", "stages", "bounds"),
    [
        ([10, 4, 4, 4, 10], 1, [0, 5]),
        # Three blocks do not come out even: the middle one goes to the first stage, where both ways are as heavy.
        ([10, 4, 4, 4, 10], 2, [0, 3, 5]),
        ([10, 4, 4, 4, 10], 3, [0, 2, 3, 5]),
        # A heavy embedding leaves the other blocks to later stages; a heavy head, to earlier ones.
        ([50, 4, 4, 4, 4, 1], 2, [0, 2, 6]),
        ([1, 4, 4, 4, 4, 50], 2, [0, 4, 6]),
    ],
)
def test_known_cuts(weights: list[int], stages: int, bounds: list[int]) -> None:
    assert stage_bounds(weights, stages) == bounds


def test_more_stages_than_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="3 blocks cannot fill 4 stages"):
        stage_bounds([1, 1, 1, 1, 1], 4)
