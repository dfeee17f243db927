"""Vendor metadata is our codes in another order: any order is applied exactly, undone exactly, and held by its block.

Run: pytest tests/sparse/kernels/test_metadata.py
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slope_dist.sparse.kernels.metadata import MetadataLayout, permute_nibbles

pytestmark = pytest.mark.usefixtures("nan_scratch")

ROWS, COLUMNS = 32, 48
GROUPS = ROWS * COLUMNS // 4


def nibbles(packed: Tensor) -> list[int]:
    return [half for byte in packed.reshape(-1).tolist() for half in (byte & 15, byte >> 4)]


def permutation(length: int, seed: int) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).int()


def repeated(block: Tensor, times: int) -> Tensor:
    return torch.cat([block + number * len(block) for number in range(times)])


def random_bytes(seed: int) -> Tensor:
    return torch.randint(256, (ROWS, COLUMNS // 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_each_nibble_comes_from_where_the_source_says() -> None:
    packed, source = random_bytes(0).view(-1), permutation(GROUPS, 1)
    before = nibbles(packed)
    assert nibbles(permute_nibbles(packed, source)) == [before[number] for number in source.tolist()]


@pytest.mark.parametrize("block_rows", [1, 4, 16, 32])
def test_a_repeating_order_is_held_as_one_block_and_means_the_whole(block_rows: int) -> None:
    whole = repeated(permutation(block_rows * COLUMNS // 4, 2), ROWS // block_rows)
    layout = MetadataLayout.of(whole, ROWS)
    assert layout.source.numel() == block_rows * COLUMNS // 4
    ours = random_bytes(3)
    before = nibbles(ours)
    assert nibbles(layout.vendor(ours)) == [before[number] for number in whole.tolist()]


@pytest.mark.parametrize("seed", range(3))
def test_ours_undoes_vendor(seed: int) -> None:
    layout, ours = MetadataLayout.of(permutation(GROUPS, seed), ROWS), random_bytes(seed)
    theirs = layout.vendor(ours)
    assert theirs.shape == (ROWS * COLUMNS // 8,) and not theirs.equal(ours.view(-1))
    assert layout.ours(theirs, (ROWS, COLUMNS)).equal(ours)


def test_an_order_that_repeats_but_for_one_swap_is_held_whole() -> None:
    whole = repeated(permutation(4 * COLUMNS // 4, 5), ROWS // 4)
    whole[-2:] = whole[-2:].flip(0)
    assert MetadataLayout.of(whole, ROWS).source.equal(whole)
