"""Metadata in CUTLASS's orders: equal to what torch makes for Ampere and to a table written out for Hopper, and back.

Run: pytest tests/sparse/kernels/test_cutlass_layout.py
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.sparse import _semi_structured_conversions as conversions

from slope_dist.sparse import CompressedMatrix, Pattern, codec
from slope_dist.sparse.kernels.cutlass import layout

pytestmark = pytest.mark.usefixtures("nan_scratch")

SHAPES_80 = [(32, 32), (64, 32), (32, 64), (96, 160), (256, 128), (160, 96)]
SHAPES_90 = [(64, 64), (128, 64), (64, 128), (192, 320), (320, 192)]


def compressed(rows: int, columns: int) -> CompressedMatrix:
    return CompressedMatrix.prune(torch.randn(rows, columns).half(), Pattern(2, 4))


def nibbles(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).reshape(-1)


@pytest.mark.parametrize(("rows", "columns"), SHAPES_80)
def test_ampere_equals_what_torch_makes_of_the_dense_matrix(rows: int, columns: int) -> None:
    matrix = compressed(rows, columns)
    dense = codec.expand(matrix.values, matrix.indices, matrix.pattern)
    values, metadata = conversions.sparse_semi_structured_from_dense_cutlass(dense)
    assert values.equal(matrix.values)
    assert layout.sm80(rows, columns).vendor(matrix.indices).equal(metadata.reshape(-1).view(torch.uint8))


def place_on_hopper(row: int, group: int, rows: int) -> int:
    """Nibble of a group's code: strides, in logical elements, of the 64 x 64 block of 16-bit values of CUTLASS 4.2."""
    column = 4 * group
    inner = (row % 8) * 64 + (row // 8 % 2) * 16 + (row // 16 % 4) * 1024
    inner += column % 16 + (column // 16 % 2) * 512 + (column // 32 % 2) * 32
    return (inner + row // 64 * 4096 + column // 64 * rows * 64) // 4


@pytest.mark.parametrize(("rows", "columns"), SHAPES_90)
def test_hopper_equals_the_strides_of_its_block(rows: int, columns: int) -> None:
    indices = compressed(rows, columns).indices
    moved = nibbles(layout.sm90(rows, columns).vendor(indices)).tolist()
    codes = nibbles(indices).view(rows, columns // 4).tolist()
    places = [[place_on_hopper(row, group, rows) for group in range(columns // 4)] for row in range(rows)]
    assert sorted(place for row in places for place in row) == list(range(rows * columns // 4))
    for row in range(rows):
        assert [moved[place] for place in places[row]] == codes[row]


@pytest.mark.parametrize("order", [layout.sm80, layout.sm90], ids=["sm_80", "sm_90a"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES_90)
def test_round_trip(order, rows: int, columns: int) -> None:
    indices = torch.randint(256, (rows, columns // 8), dtype=torch.uint8)
    there = order(rows, columns).vendor(indices)
    assert there.shape == (rows * columns // 8,) and not there.equal(indices.view(-1))
    back = order(rows, columns).ours(there, (rows, columns))
    assert back.equal(indices)


def test_metadata_at_any_place_in_memory() -> None:
    buffer = torch.randint(256, (1 + 64 * 8,), dtype=torch.uint8)
    indices = buffer[1:].view(64, 8)
    expected = layout.sm90(64, 64).vendor(indices.clone())
    assert layout.sm90(64, 64).vendor(indices).equal(expected)
    moved = torch.cat([buffer[:1], expected])[1:]
    assert layout.sm90(64, 64).ours(moved, (64, 64)).equal(indices)
