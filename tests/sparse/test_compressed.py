"""Shard-then-double-prune equals double-prune-then-shard to the bit, over random cuts; bad cuts are refused.

Run: pytest tests/sparse/test_compressed.py
"""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slope_dist.sparse import CompressedMatrix, Pattern, codec, pruning
from tests.sparse import oracle

PATTERNS = [Pattern(n, m) for n, m in oracle.PATTERNS]


def assert_same_matrix(left: CompressedMatrix, right: CompressedMatrix) -> None:
    assert left.pattern == right.pattern
    assert oracle.same_bits(left.values, right.values)
    assert oracle.same_bits(left.indices, right.indices)
    assert (left.column_mask is None) == (right.column_mask is None)
    if left.column_mask is not None and right.column_mask is not None:
        assert oracle.same_bits(left.column_mask, right.column_mask)


@st.composite
def matrix_and_rectangle(draw: st.DrawFn) -> tuple[Tensor, CompressedMatrix, tuple[int, int], tuple[int, int]]:
    """A dense weight, its compressed form (sometimes with a held mask), and good row and column cuts."""
    pattern = draw(st.sampled_from(PATTERNS))
    rows, columns = 8 * draw(st.integers(1, 8)), 8 * draw(st.integers(1, 8))
    ranges = []
    for size in (rows, columns):
        first, last = sorted(draw(st.tuples(st.integers(0, size // 8), st.integers(0, size // 8))))
        if first == last:
            first, last = 0, size // 8
        ranges.append((8 * first, 8 * last))
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    dense = oracle.difficult_matrix(draw(st.sampled_from(("random", "ties", "signed zeros"))), rows, columns)
    matrix = CompressedMatrix.prune(dense.to(draw(st.sampled_from((torch.float32, torch.bfloat16)))), pattern)
    if draw(st.booleans()):
        old = codec.gather(torch.randn(rows, columns), matrix.indices, pattern)
        held = codec.pack_bits(pruning.column_mask(old, matrix.indices, pattern))
        matrix = CompressedMatrix(matrix.values, matrix.indices, pattern, held)
    return dense.to(matrix.values.dtype), matrix, ranges[0], ranges[1]


@settings(max_examples=150, deadline=None)
@given(matrix_and_rectangle())
def test_a_shard_is_the_slice_of_the_whole_to_the_bit(drawn) -> None:
    dense, matrix, (top, bottom), (left, right) = drawn
    shard = matrix.cut(0, top, bottom).cut(1, left, right)
    area = (slice(top, bottom), slice(left, right))
    assert shard.shape == (bottom - top, right - left)
    assert oracle.same_bits(shard.indices, matrix.indices[top:bottom, left // 8 : right // 8])
    assert oracle.same_bits(shard.expand(), matrix.expand()[area])
    assert oracle.same_bits(shard.doubly_pruned(), matrix.doubly_pruned()[area])
    assert_same_matrix(matrix.cut(1, left, right).cut(0, top, bottom), shard)

    from_dense = CompressedMatrix.prune(dense[area], matrix.pattern)
    assert oracle.same_bits(from_dense.values, shard.values)
    assert oracle.same_bits(from_dense.indices, shard.indices)

    def transpose(part: CompressedMatrix) -> CompressedMatrix:
        kept = None if part.column_mask is None else codec.unpack_bits(part.column_mask)
        return CompressedMatrix(
            *pruning.doubly_pruned_transpose(part.values, part.indices, part.pattern, kept), part.pattern
        )

    assert_same_matrix(transpose(matrix).cut(0, left, right).cut(1, top, bottom), transpose(shard))


@settings(max_examples=50, deadline=None)
@given(matrix_and_rectangle(), st.sampled_from((0, 1)), st.data())
def test_join_undoes_any_cut(drawn, dim: int, data: st.DataObject) -> None:
    _, matrix, _, _ = drawn
    size = matrix.shape[dim]
    inner = sorted(data.draw(st.sets(st.integers(0, size // 8).map(lambda eighth: 8 * eighth), max_size=4)) - {0, size})
    bounds = [0, *inner, size]
    parts = [matrix.cut(dim, start, stop) for start, stop in pairwise(bounds)]
    assert_same_matrix(CompressedMatrix.join(parts, dim), matrix)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_equal_shards_join_to_the_whole(dim: int, pattern: Pattern) -> None:
    matrix = CompressedMatrix.prune(torch.randn(64, 96), pattern)
    parts = [matrix.shard(dim, rank, 4) for rank in range(4)]
    assert [part.shape for part in parts] == [((16, 96), (64, 24))[dim]] * 4
    assert_same_matrix(CompressedMatrix.join(parts, dim), matrix)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_blank_matrix_is_zeros_under_a_valid_pattern(pattern: Pattern) -> None:
    blank, pruned = CompressedMatrix.blank((24, 40), pattern), CompressedMatrix.prune(torch.randn(24, 40), pattern)
    assert blank.shape == (24, 40)
    codec.check(blank.indices, pattern)
    assert not blank.values.any()
    for ours, other in ((blank.values, pruned.values), (blank.indices, pruned.indices)):
        assert (ours.shape, ours.dtype, ours.is_contiguous()) == (other.shape, other.dtype, True)
    assert oracle.same_bits(blank.indices, CompressedMatrix.prune(torch.zeros(24, 40), pattern).indices)


def test_a_cut_is_a_copy() -> None:
    matrix = CompressedMatrix.prune(torch.randn(16, 16), Pattern(2, 4))
    whole = matrix.expand()
    for dim in (0, 1):
        part = matrix.cut(dim, 0, 8)
        assert part.values.is_contiguous() and part.indices.is_contiguous()
        part.values.zero_()
        part.indices.zero_()
    assert oracle.same_bits(matrix.expand(), whole)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from((0, 1)), st.integers(1, 8), st.integers(0, 64), st.integers(0, 64))
def test_a_cut_off_the_multiples_is_refused_with_the_nearest_good_ones(dim: int, eighths: int, a: int, b: int) -> None:
    size = 8 * eighths
    start, stop = sorted((min(a, size), min(b, size)))
    shape = (size, 8) if dim == 0 else (8, size)
    matrix = CompressedMatrix.prune(torch.randn(shape), Pattern(2, 4))
    bad = [position for position in (start, stop) if position % 8]
    if not bad:
        assert matrix.cut(dim, start, stop).shape[dim] == stop - start
        return
    below = bad[0] // 8 * 8
    what = ("rows", "columns")[dim]
    message = f"{bad[0]} of {size} {what} .* {below} and {below + 8}$"
    with pytest.raises(ValueError, match=message):
        matrix.cut(dim, start, stop)


@pytest.mark.parametrize(("start", "stop"), [(-8, 8), (0, 24), (16, 8)])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_range_outside_or_backwards_is_refused(dim: int, start: int, stop: int) -> None:
    matrix = CompressedMatrix.prune(torch.randn(16, 16), Pattern(2, 4))
    with pytest.raises(ValueError):
        matrix.cut(dim, start, stop)


@pytest.mark.parametrize(
    ("dim", "world_size", "message"),
    [
        (0, 5, "48 rows do not divide into 5 equal parts"),
        (1, 3, "80 columns do not divide into 3 equal parts"),
        (0, 4, "cut at 12 of 48 rows .* 8 and 16"),
        (1, 4, "cut at 20 of 80 columns .* 16 and 24"),
    ],
)
def test_unequal_or_misaligned_shards_are_refused(dim: int, world_size: int, message: str) -> None:
    matrix = CompressedMatrix.prune(torch.randn(48, 80), Pattern(2, 4))
    with pytest.raises(ValueError, match=message):
        matrix.shard(dim, 0, world_size)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    matrix = CompressedMatrix.prune(torch.randn(16, 16), Pattern(2, 4))
    with pytest.raises(ValueError, match=re.escape("outside rows of 16")):
        matrix.shard(0, rank, 2)


def test_parts_with_and_without_a_held_mask_do_not_join() -> None:
    matrix = CompressedMatrix.prune(torch.randn(16, 16), Pattern(2, 4))
    held = CompressedMatrix(matrix.values, matrix.indices, matrix.pattern, matrix.indices)
    with pytest.raises(ValueError, match="column mask"):
        CompressedMatrix.join([matrix, held], 0)
