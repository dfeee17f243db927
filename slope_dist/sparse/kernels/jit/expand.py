"""Dense matrices from compressed ones: W^R as `codec.expand`, W^{R,C} as `pruning.doubly_pruned`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slope_dist.sparse import codec
from slope_dist.sparse.kernels.jit import blocks, eights_of, launch
from slope_dist.sparse.kernels.jit.tile import PRUNED, entry_of, first_of, join4, nibbles_of, score_of, two_best

_BYTES = 512
"""Metadata bytes to a program of 128 threads: each writes four times 16 bytes of 16-bit entries."""

_TILE_BYTES = 128
"""The same in each of the four rows of a program that prunes: each thread writes 16 bytes of each."""


@triton.jit
def _expand(kept, indices, held, dense, width, HELD: tl.constexpr, BYTES: tl.constexpr):
    start = first_of(BYTES)
    left = tl.minimum(width - start, BYTES).to(tl.int32)
    byte = tl.arange(0, BYTES)
    slot = tl.arange(0, 4 * BYTES)
    code = nibbles_of(tl.load(indices + start + byte, mask=byte < left, other=0))
    pairs = tl.load(kept + start * 4 + slot, mask=slot < left * 4, other=0).reshape([2 * BYTES, 2])
    first, second = pairs.split()
    zero = tl.zeros_like(first)
    group = ()
    for position in tl.static_range(4):
        group = group + (entry_of(first, second, code, position, zero),)
    if HELD:
        bits = nibbles_of(tl.load(held + start + byte, mask=byte < left, other=0))
        a = tl.where((bits & 1) != 0, group[0], zero)
        b = tl.where((bits & 2) != 0, group[1], zero)
        c = tl.where((bits & 4) != 0, group[2], zero)
        d = tl.where((bits & 8) != 0, group[3], zero)
        group = (a, b, c, d)
    entry = tl.arange(0, 8 * BYTES)
    entries = join4(group[0], group[1], group[2], group[3]).reshape([8 * BYTES])
    tl.store(dense + start * 8 + entry, entries, mask=entry < left * 8)


@triton.jit
def _prune(kept, indices, dense, width, LARGEST: tl.constexpr, BYTES: tl.constexpr):
    # Programs cover a row of tiles (four rows of the matrix) one after another.
    across = tl.cdiv(width, BYTES)
    tile_row = tl.program_id(0) // across
    column = (tl.program_id(0) - tile_row * across) * BYTES
    start = tile_row.to(tl.int64) * 4 * width + column
    left = tl.minimum(width - column, BYTES)
    byte = tl.arange(0, BYTES)
    slot = tl.arange(0, 4 * BYTES)
    entry = tl.arange(0, 8 * BYTES)
    rows = ()
    for q in tl.static_range(4):
        at = start + q * width
        code = nibbles_of(tl.load(indices + at + byte, mask=byte < left, other=0))
        pairs = tl.load(kept + at * 4 + slot, mask=slot < left * 4, other=0).reshape([2 * BYTES, 2])
        first, second = pairs.to(tl.int32).split()
        rows = rows + ((first, second, code),)
    zero = tl.zeros_like(rows[0][0])
    pruned = tl.full(zero.shape, PRUNED, tl.int32)
    columns = ()
    for position in tl.static_range(4):
        entries = ()
        scores = ()
        for q in tl.static_range(4):
            first, second, code = rows[q]
            entries = entries + (entry_of(first, second, code, position, zero),)
            both = score_of(first, LARGEST), score_of(second, LARGEST)
            scores = scores + (entry_of(both[0], both[1], code, position, pruned),)
        best = two_best(scores[0], scores[1], scores[2], scores[3])
        column_entries = ()
        for q in tl.static_range(4):
            column_entries = column_entries + (tl.where(best[q], entries[q], zero),)
        columns = columns + (column_entries,)
    for q in tl.static_range(4):
        row = join4(columns[0][q], columns[1][q], columns[2][q], columns[3][q]).reshape([8 * BYTES])
        tl.store(dense + (start + q * width) * 8 + entry, row.to(dense.dtype.element_ty), mask=entry < left * 8)


def expand(values: Tensor, indices: Tensor) -> Tensor:
    """W^R with zeros where nothing is kept: values [O, K], indices uint8 [O, I / 8] -> [O, I].

    One pass: reads 1 byte an element of 16 bits and 1/8 of metadata, writes 2.

    Raises:
        ValueError: if the two do not belong together or are not contiguous.
    """
    return _expanded(values, indices, None)


def doubly_pruned(values: Tensor, indices: Tensor, column_mask: Tensor | None = None) -> Tensor:
    """W^{R,C} with zeros where nothing is kept -> [O, I].

    One pass: reads 1 byte an element of 16 bits, 1/8 of metadata and 1/8 of a held mask, writes 2.

    Args:
        values: [O, K].
        indices: uint8 [O, I / 8].
        column_mask: packed uint8 [O, I / 8], the second mask where it is held; None means by magnitude now.

    Raises:
        ValueError: if they do not belong together or are not contiguous; by magnitude, if O is no multiple of 4.
    """
    if column_mask is not None:
        return _expanded(values, indices, column_mask)
    rows, width = eights_of(values, indices, 4)
    if rows % 4:
        raise ValueError(f"{rows} rows are not a whole number of groups of 4")
    kept = codec.as_integers(values)
    dense = torch.empty(rows, 8 * width, dtype=values.dtype, device=values.device)
    programs = rows // 4 * blocks(width, _TILE_BYTES)
    largest = torch.iinfo(kept.dtype).max
    launch(_prune, programs, kept, indices, codec.as_integers(dense), width, LARGEST=largest, BYTES=_TILE_BYTES)
    return dense


def _expanded(values: Tensor, indices: Tensor, column_mask: Tensor | None) -> Tensor:
    rows, width = eights_of(values, indices, 4, column_mask)
    dense = torch.empty(rows, 8 * width, dtype=values.dtype, device=values.device)
    launch(
        _expand,
        blocks(rows * width, _BYTES),
        codec.as_integers(values),
        indices,
        column_mask,
        codec.as_integers(dense),
        rows * width,
        HELD=column_mask is not None,
        BYTES=_BYTES,
    )
    return dense
