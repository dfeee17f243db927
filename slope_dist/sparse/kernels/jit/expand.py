"""Dense matrices from compressed ones: W^R as `codec.expand`, W^{R,C} as `pruning.doubly_pruned`."""

# Device functions are in Triton's language: names change their type, and tuples are summed, not starred.
# mypy: disable-error-code="assignment, misc, var-annotated"
# ruff: noqa: RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slope_dist.sparse import codec
from slope_dist.sparse.kernels.jit import blocks, eights_of, launch
from slope_dist.sparse.kernels.jit.tile import (
    entry_of,
    first_of,
    join4,
    left_of,
    nibbles_of,
    score_of,
    two_best,
)

_BYTES = 128
"""Metadata bytes to each step (or row of tiles) of a program of 128 threads: a thread has one byte of them and writes
its eight entries, at 16 bits at once. So no value passes from one thread to another."""

_STEPS = 4
"""Steps of a program that only expands, whose loads are all under way before the first is used."""


@triton.jit
def _expand(
    kept,
    indices,
    held,
    dense,
    size,
    HELD: tl.constexpr,
    PACKED: tl.constexpr,
    STEPS: tl.constexpr,
    BYTES: tl.constexpr,
):
    # PACKED: entries have 16 bits, and `dense` is written as 64-bit words of four.
    byte = tl.arange(0, BYTES)
    slot = tl.arange(0, 4 * BYTES)
    loaded = ()
    for step in tl.static_range(STEPS):
        start = first_of(STEPS * BYTES) + step * BYTES
        left = left_of(start, size, BYTES)
        packed = tl.load(indices + start + byte, mask=byte < left, other=0)
        bits = packed
        if HELD:
            bits = tl.load(held + start + byte, mask=byte < left, other=0)
        loaded = loaded + ((packed, bits, tl.load(kept + start * 4 + slot, mask=slot < left * 4, other=0)),)
    for step in tl.static_range(STEPS):
        start = first_of(STEPS * BYTES) + step * BYTES
        left = left_of(start, size, BYTES)
        code = nibbles_of(loaded[step][0])
        first, second = loaded[step][2].to(tl.int32).reshape([2 * BYTES, 2]).split()
        if HELD:
            bits = nibbles_of(loaded[step][1])
            first = tl.where((bits >> (code & 3) & 1) != 0, first, 0)
            second = tl.where((bits >> (code >> 2) & 1) != 0, second, 0)
        if PACKED:
            low = (first & 0xFFFF).to(tl.int64) << ((code & 3) * 16).to(tl.int64)
            high = (second & 0xFFFF).to(tl.int64) << ((code >> 2) * 16).to(tl.int64)
            group = tl.arange(0, 2 * BYTES)
            tl.store(dense + start * 2 + group, low | high, mask=group < left * 2)
        else:
            a, d = entry_of(first, second, code, 0), entry_of(first, second, code, 3)
            b, c = entry_of(first, second, code, 1), entry_of(first, second, code, 2)
            entry = tl.arange(0, 8 * BYTES)
            tl.store(dense + start * 8 + entry, join4(a, b, c, d).reshape([8 * BYTES]), mask=entry < left * 8)


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
    columns = ()
    for position in tl.static_range(4):
        entries = ()
        scores = ()
        for q in tl.static_range(4):
            first, second, code = rows[q]
            entries = entries + (entry_of(first, second, code, position),)
            both = score_of(first, LARGEST), score_of(second, LARGEST)
            scores = scores + (entry_of(both[0], both[1], code, position),)
        lower, upper, a_leads, c_leads = two_best(scores[0], scores[1], scores[2], scores[3])
        best = (
            ~upper & (lower | a_leads),
            ~upper & (lower | ~a_leads),
            ~lower & (upper | c_leads),
            ~lower & (upper | ~c_leads),
        )
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
    programs = rows // 4 * blocks(width, _BYTES)
    largest = torch.iinfo(kept.dtype).max
    launch(_prune, programs, kept, indices, codec.as_integers(dense), width, LARGEST=largest, BYTES=_BYTES)
    return dense


def _expanded(values: Tensor, indices: Tensor, column_mask: Tensor | None) -> Tensor:
    rows, width = eights_of(values, indices, 4, column_mask)
    dense = torch.empty(rows, 8 * width, dtype=values.dtype, device=values.device)
    packed = values.element_size() == 2
    launch(
        _expand,
        blocks(rows * width, _STEPS * _BYTES),
        codec.as_integers(values),
        indices,
        column_mask,
        dense.view(torch.int64 if packed else torch.int32),
        rows * width,
        HELD=column_mask is not None,
        PACKED=packed,
        STEPS=_STEPS,
        BYTES=_BYTES,
    )
    return dense
