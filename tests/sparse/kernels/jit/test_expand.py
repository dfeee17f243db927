"""The kernels that make dense matrices give the bits of the loop and of codec and pruning, and write nothing else.

Run: pytest tests/sparse/kernels/jit/test_expand.py
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slope_dist.sparse import CompressedMatrix, Pattern, codec, pruning
from slope_dist.sparse.kernels import primitives
from slope_dist.sparse.kernels.jit.expand import doubly_pruned, expand
from tests.sparse import oracle
from tests.sparse.kernels.devices import DEVICES

PATTERN = Pattern(2, 4)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

pytestmark = [pytest.mark.parametrize("device", DEVICES)]
guarded = pytest.mark.usefixtures("guarded_scratch")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
kinds = pytest.mark.parametrize("kind", oracle.KINDS)


def masked(dense: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, dense, torch.zeros((), dtype=dense.dtype))


@guarded
@dtypes
@kinds
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (12, 24), (36, 136), (64, 512)])
def test_expand_equals_the_loop_and_the_codec(
    rows: int, columns: int, kind: str, dtype: torch.dtype, device: str
) -> None:
    dense = oracle.difficult_matrix(kind, rows, columns, dtype)
    mask = oracle.row_mask(torch.randn(rows, columns), 2, 4)
    values, indices = oracle.kept_entries(dense, mask), codec.pack(mask, PATTERN)
    expanded = expand(values.to(device), indices.to(device)).cpu()
    assert oracle.same_bits(expanded, masked(dense, mask))
    assert oracle.same_bits(expanded, codec.expand(values, indices, PATTERN))


@guarded
@dtypes
@kinds
@pytest.mark.parametrize(("rows", "columns"), [(4, 8), (12, 24), (20, 136), (8, 1032)])
def test_doubly_pruned_equals_the_loop_and_pruning(
    rows: int, columns: int, kind: str, dtype: torch.dtype, device: str
) -> None:
    dense = oracle.difficult_matrix(kind, rows, columns, dtype)
    kept = oracle.row_mask(dense, 2, 4)
    matrix = CompressedMatrix.prune(dense, PATTERN)
    w_rc = doubly_pruned(matrix.values.to(device), matrix.indices.to(device)).cpu()
    assert oracle.same_bits(w_rc, masked(dense, oracle.column_mask(dense, kept, 2, 4)))
    assert oracle.same_bits(w_rc, matrix.doubly_pruned())


@guarded
@dtypes
@kinds
def test_the_packed_column_mask_is_that_of_pruning(kind: str, dtype: torch.dtype, device: str) -> None:
    matrix = CompressedMatrix.prune(oracle.difficult_matrix(kind, 24, 136, dtype), PATTERN)
    assert primitives.why_no_triton(device) is None
    kept = primitives.column_mask(matrix.values.to(device), matrix.indices.to(device)).cpu()
    assert kept.equal(codec.pack_bits(pruning.column_mask(matrix.values, matrix.indices, PATTERN)))


@guarded
@dtypes
def test_kept_zeros_win_over_what_is_not_kept(dtype: torch.dtype, device: str) -> None:
    kept = oracle.row_mask(torch.randn(8, 40), 2, 4)
    zeros = oracle.difficult_matrix("zeros", 8, 40, dtype)
    values = oracle.kept_entries(zeros, kept)
    w_rc = doubly_pruned(values.to(device), codec.pack(kept, PATTERN).to(device)).cpu()
    # Told by the signs: every kept -0.0 is there, and nothing else is negative.
    assert oracle.same_bits(w_rc, masked(zeros, oracle.column_mask(zeros, kept, 2, 4)))
    assert w_rc.signbit().any()


@guarded
@dtypes
@pytest.mark.parametrize(("rows", "columns"), [(6, 8), (20, 136)])
def test_a_held_mask_replaces_magnitude(rows: int, columns: int, dtype: torch.dtype, device: str) -> None:
    dense = oracle.difficult_matrix("signed zeros", rows, columns, dtype)
    kept = oracle.row_mask(dense, 2, 4)
    held = torch.rand(rows, columns) < 0.5
    values, indices = oracle.kept_entries(dense, kept), codec.pack(kept, PATTERN)
    w_rc = doubly_pruned(*(t.to(device) for t in (values, indices, codec.pack_bits(held)))).cpu()
    assert oracle.same_bits(w_rc, masked(dense, kept & held))
    assert oracle.same_bits(w_rc, pruning.doubly_pruned(values, indices, PATTERN, held))


@guarded
@dtypes
@pytest.mark.parametrize("held", [False, True], ids=["magnitude", "held"])
def test_any_bits_at_any_address(held: bool, dtype: torch.dtype, device: str) -> None:
    """NaN of every payload ranks as in the twin; no load takes an address for a multiple of more than an entry."""
    values = any_bits(12, 68, dtype, device)
    indices = codec.pack(oracle.row_mask(torch.randn(12, 136), 2, 4), PATTERN)
    assert oracle.same_bits(expand(values, indices.to(device)).cpu(), codec.expand(values.cpu(), indices, PATTERN))
    bits = torch.rand(12, 136) < 0.5 if held else None
    packed = codec.pack_bits(bits).to(device) if bits is not None else None
    w_rc = doubly_pruned(values, indices.to(device), packed).cpu()
    assert oracle.same_bits(w_rc, pruning.doubly_pruned(values.cpu(), indices, PATTERN, bits))


def any_bits(rows: int, columns: int, dtype: torch.dtype, device: str) -> Tensor:
    """Entries of all bit patterns, two thirds of them of the few least or largest magnitudes, off any alignment."""
    integer = codec.as_integers(torch.empty(0, dtype=dtype)).dtype
    largest = torch.iinfo(integer).max
    size = rows * columns + 1
    ranges = [(0, 4), (largest - 3, largest + 1), (0, largest)]
    choices = torch.stack([torch.randint(low, high, (size,)) for low, high in ranges])
    magnitudes = choices.gather(0, torch.randint(3, (1, size))).squeeze(0)
    bits = torch.where(torch.rand(size) < 0.5, magnitudes, magnitudes - largest - 1)
    return bits.to(integer).view(dtype).to(device)[1:].view(rows, columns)


def test_rows_that_are_no_whole_tiles_are_refused(device: str) -> None:
    matrix = CompressedMatrix.prune(torch.randn(6, 16), PATTERN)
    with pytest.raises(ValueError, match="6 rows"):
        doubly_pruned(matrix.values.to(device), matrix.indices.to(device))
    with pytest.raises(ValueError, match="metadata must be uint8"):
        mask = torch.zeros(6, 3, dtype=torch.uint8, device=device)
        doubly_pruned(matrix.values.to(device), matrix.indices.to(device), mask)
