"""The transpose kernel gives the values and metadata, free slots included, of the loop and of pruning, bit for bit.

Run: pytest tests/sparse/kernels/jit/test_transpose.py
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slope_dist.sparse import CompressedMatrix, Pattern, codec, pruning
from slope_dist.sparse.kernels.jit.transpose import transpose
from tests.sparse import oracle
from tests.sparse.kernels.devices import DEVICES
from tests.sparse.kernels.jit.test_expand import any_bits

PATTERN = Pattern(2, 4)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

pytestmark = [pytest.mark.parametrize("device", DEVICES)]
guarded = pytest.mark.usefixtures("guarded_scratch")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def expected(dense: Tensor, doubly_kept: Tensor) -> tuple[Tensor, list[list[int]]]:
    """By the loop: values [I, O / 2] and the bytes of the metadata."""
    slots = oracle.slots_of_transpose(doubly_kept, 2, 4)
    w_rc = torch.where(doubly_kept, dense, torch.zeros((), dtype=dense.dtype))
    return oracle.kept_entries(w_rc.t(), slots), oracle.pack(slots, 2, 4)


def assert_is(actual: tuple[Tensor, Tensor], values: Tensor, indices: list[list[int]]) -> None:
    assert oracle.same_bits(actual[0].cpu(), values)
    assert actual[1].dtype == torch.uint8 and actual[1].tolist() == indices


@guarded
@dtypes
@pytest.mark.parametrize("kind", oracle.KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (24, 136), pytest.param(136, 24, marks=pytest.mark.slow)])
def test_equals_the_loop_and_pruning(rows: int, columns: int, kind: str, dtype: torch.dtype, device: str) -> None:
    dense = oracle.difficult_matrix(kind, rows, columns, dtype)
    doubly_kept = oracle.column_mask(dense, oracle.row_mask(dense, 2, 4), 2, 4)
    matrix = CompressedMatrix.prune(dense, PATTERN)
    actual = transpose(matrix.values.to(device), matrix.indices.to(device))
    assert_is(actual, *expected(dense, doubly_kept))
    twin = pruning.doubly_pruned_transpose(matrix.values, matrix.indices, PATTERN)
    assert all(oracle.same_bits(ours.cpu(), theirs) for ours, theirs in zip(actual, twin, strict=True))


@guarded
def test_into_the_head_of_a_buffer(device: str) -> None:
    matrix = CompressedMatrix.prune(torch.randn(24, 136), PATTERN)
    buffer = torch.zeros(136 * 12 + 8, device=device)
    values, indices = transpose(
        matrix.values.to(device), matrix.indices.to(device), None, buffer[: 136 * 12].view(136, 12)
    )
    twin = pruning.doubly_pruned_transpose(matrix.values, matrix.indices, PATTERN)
    assert values.data_ptr() == buffer.data_ptr() and not buffer[136 * 12 :].any()
    assert oracle.same_bits(values.cpu(), twin[0]) and indices.cpu().equal(twin[1])
    with pytest.raises(ValueError, match=r"does not go into \[12, 136\]"):
        transpose(matrix.values.to(device), matrix.indices.to(device), None, buffer[: 136 * 12].view(12, 136))


@guarded
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_programs_in_both_directions(dtype: torch.dtype, device: str) -> None:
    matrix = CompressedMatrix.prune(torch.randn(264, 280).to(dtype), PATTERN)
    actual = transpose(matrix.values.to(device), matrix.indices.to(device))
    twin = pruning.doubly_pruned_transpose(matrix.values, matrix.indices, PATTERN)
    assert all(oracle.same_bits(ours.cpu(), theirs) for ours, theirs in zip(actual, twin, strict=True))


@guarded
@dtypes
def test_kept_zeros_win_over_what_is_not_kept(dtype: torch.dtype, device: str) -> None:
    kept = oracle.row_mask(torch.randn(16, 40), 2, 4)
    zeros = oracle.difficult_matrix("zeros", 16, 40, dtype)
    actual = transpose(oracle.kept_entries(zeros, kept).to(device), codec.pack(kept, PATTERN).to(device))
    doubly_kept = oracle.column_mask(zeros, kept, 2, 4)
    assert_is(actual, *expected(zeros, doubly_kept))
    # Free slots hold +0, in the lowest places, among kept zeros of both signs.
    free = ~doubly_kept & oracle.slots_of_transpose(doubly_kept, 2, 4).t()
    assert free.any()
    assert not codec.expand(actual[0].cpu(), actual[1].cpu(), PATTERN).t()[free].signbit().any()


@guarded
@dtypes
def test_a_held_mask_replaces_magnitude(dtype: torch.dtype, device: str) -> None:
    dense = oracle.difficult_matrix("signed zeros", 24, 136, dtype)
    kept = oracle.row_mask(dense, 2, 4)
    held = oracle.column_mask(torch.randn(24, 136), kept, 2, 4)
    assert not held.equal(oracle.column_mask(dense, kept, 2, 4))
    values, indices = oracle.kept_entries(dense, kept), codec.pack(kept, PATTERN)
    assert_is(transpose(*(t.to(device) for t in (values, indices, codec.pack_bits(held)))), *expected(dense, held))


@guarded
@dtypes
@pytest.mark.parametrize("held", [False, True], ids=["magnitude", "held"])
def test_any_bits_at_any_address(held: bool, dtype: torch.dtype, device: str) -> None:
    """Also where a held mask is none that pruning makes: of too many kept the first two, of what W^R lacks a zero."""
    values = any_bits(24, 68, dtype, device)
    indices = codec.pack(oracle.row_mask(torch.randn(24, 136), 2, 4), PATTERN)
    bits = torch.rand(24, 136) < 0.5 if held else None
    packed = codec.pack_bits(bits).to(device) if bits is not None else None
    actual = transpose(values, indices.to(device), packed)
    twin = pruning.doubly_pruned_transpose(values.cpu(), indices, PATTERN, bits)
    assert all(oracle.same_bits(ours.cpu(), theirs) for ours, theirs in zip(actual, twin, strict=True))


def test_rows_that_are_no_whole_bytes_of_the_transpose_are_refused(device: str) -> None:
    matrix = CompressedMatrix.prune(torch.randn(12, 16), PATTERN)
    with pytest.raises(ValueError, match="12 rows are not a multiple of 8"):
        transpose(matrix.values.to(device), matrix.indices.to(device))
