"""The compressed (W^{R,C})^T from the compressed W^R, as `pruning.doubly_pruned_transpose`; no dense matrix is made."""

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
from slope_dist.sparse.kernels.jit.tile import entry_of, join4, score_of, split4, two_best

_EIGHTS = 16
"""A program owns 16 x 16 squares of 8 x 8, 128 x 128 of W, one square to each of its 256 threads. So it reads and
writes `values` in runs of 64 entries, 128 bytes at 16 bits, and metadata in runs of 16 bytes."""

_WARPS = 8
_REGISTERS = 128
"""At most, a thread: left alone the compiler takes so many that one program has a multiprocessor to itself, and its
loads wait for its comparisons."""


@triton.jit
def _pruned_column(rows, position: tl.constexpr, HELD: tl.constexpr, LARGEST: tl.constexpr):
    """One column of 4x4 tiles as a group of the transpose.

    `rows`: of each row of the tile (first, second, code, held bits). Returns (first, second, code) of the column; slots
    without a kept entry take the lowest free positions and hold zero.
    """
    zero = tl.zeros_like(rows[0][0])
    entries = ()
    scores = ()
    for q in tl.static_range(4):
        first, second, code, held = rows[q]
        entry = entry_of(first, second, code, position)
        if HELD:
            bit = held >> position & 1
            entry = tl.where(bit != 0, entry, zero)
            scores = scores + (bit,)
        else:
            score = entry_of(score_of(first, LARGEST), score_of(second, LARGEST), code, position)
            scores = scores + (score,)
        entries = entries + (entry,)
    a, b, c, d = entries
    # What is not kept scores lowest and is zero: where fewer than two are kept, the first of it fill the free slots.
    lower, upper, a_leads, c_leads = two_best(scores[0], scores[1], scores[2], scores[3])
    a_first, c_second = lower | a_leads, ~upper & c_leads
    first = tl.where(upper, c, tl.where(a_first, a, b))
    second = tl.where(lower, b, tl.where(c_second, c, d))
    code = tl.where(upper, 2, tl.where(a_first, 0, 1)) | tl.where(lower, 4, tl.where(c_second, 8, 12))
    return first, second, code


@triton.jit
def _join8(parts):
    """Eight tensors of one shape -> [..., 8]."""
    even = join4(parts[0], parts[2], parts[4], parts[6])
    odd = join4(parts[1], parts[3], parts[5], parts[7])
    shape: tl.constexpr = parts[0].shape + [8]
    return tl.join(even, odd).reshape(shape)


@triton.jit
def _transpose(
    kept,
    indices,
    held,
    transposed,
    transposed_indices,
    height,
    width,
    HELD: tl.constexpr,
    LARGEST: tl.constexpr,
    EIGHTS: tl.constexpr,
):
    # height and width count squares of 8 x 8; programs cover a row of blocks of squares one after another.
    across = tl.cdiv(width, EIGHTS)
    block_row = tl.program_id(0) // across
    top = block_row * EIGHTS
    left = (tl.program_id(0) - block_row * across) * EIGHTS
    square_row = tl.arange(0, EIGHTS)
    byte = tl.arange(0, EIGHTS)
    slot = tl.arange(0, 4 * EIGHTS)
    down = (top + square_row < height)[:, None]
    bytes_in = down & (left + byte < width)[None, :]
    slots_in = down & (slot < (width - left) * 4)[None, :]
    start = top.to(tl.int64) * 8 * width + left
    low = ()
    high = ()
    for r in tl.static_range(8):
        at = start + r * width
        row = square_row[:, None] * (8 * width)
        code = tl.load(indices + at + row + byte[None, :], mask=bytes_in, other=0).to(tl.int32)
        entries = tl.load(kept + at * 4 + row * 4 + slot[None, :], mask=slots_in, other=0).to(tl.int32)
        bits = code
        if HELD:
            bits = tl.load(held + at + row + byte[None, :], mask=bytes_in, other=0).to(tl.int32)
        a, b, c, d = split4(entries)
        low = low + ((a, b, code & 15, bits & 15),)
        high = high + ((c, d, code >> 4, bits >> 4),)
    columns = ()
    codes = ()
    for half in tl.static_range(2):
        rows = (low, high)[half]
        for position in tl.static_range(4):
            a, b, upper = _pruned_column((rows[0], rows[1], rows[2], rows[3]), position, HELD, LARGEST)
            c, d, lower = _pruned_column((rows[4], rows[5], rows[6], rows[7]), position, HELD, LARGEST)
            columns = columns + (join4(a, b, c, d).to(kept.dtype.element_ty),)
            codes = codes + ((upper | lower << 4).to(tl.uint8),)
    # [square row, square column, slot, column] -> [column of W, slots of its row in the transpose].
    across_entries = _join8(columns).permute(1, 3, 0, 2).reshape([8 * EIGHTS, 4 * EIGHTS])
    across_codes = _join8(codes).permute(1, 2, 0).reshape([8 * EIGHTS, EIGHTS])
    column = tl.arange(0, 8 * EIGHTS)
    begin = left.to(tl.int64) * 8 * height + top
    right = (column < (width - left) * 8)[:, None]
    entries_in = right & (slot < (height - top) * 4)[None, :]
    codes_in = right & (top + square_row < height)[None, :]
    row = column[:, None] * height
    tl.store(transposed + begin * 4 + row * 4 + slot[None, :], across_entries, mask=entries_in)
    tl.store(transposed_indices + begin + row + square_row[None, :], across_codes, mask=codes_in)


def transpose(
    values: Tensor, indices: Tensor, column_mask: Tensor | None = None, into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(W^{R,C})^T in the format of W^R; free slots take the lowest free positions and hold +0.

    One pass: reads and writes 1 byte an element of 16 bits and 1/8 of metadata, 2.25 in all, and reads 1/8 more where
    the mask is held.

    Args:
        values: [O, K]; O is a multiple of 8.
        indices: uint8 [O, I / 8].
        column_mask: packed uint8 [O, I / 8], the second mask where it is held; None means by magnitude now.
        into: [I, O / 2] for the values, contiguous; made here if not given.

    Returns:
        values [I, O / 2] and indices uint8 [I, O / 8].

    Raises:
        ValueError: if they do not belong together or are not contiguous, or O is no multiple of 8.
    """
    rows, width = eights_of(values, indices, 4, column_mask)
    if rows % 8:
        raise ValueError(
            f"{rows} rows are not a multiple of 8, so a row of the transpose is not whole bytes of metadata"
        )
    transposed = into
    if transposed is None:
        transposed = torch.empty(8 * width, rows // 2, dtype=values.dtype, device=values.device)
    elif transposed.shape != (8 * width, rows // 2) or not transposed.is_contiguous():
        raise ValueError(f"a transpose of {8 * width} x {rows // 2} entries does not go into {list(transposed.shape)}")
    transposed_indices = torch.empty(8 * width, rows // 8, dtype=torch.uint8, device=values.device)
    kept = codec.as_integers(values)
    launch(
        _transpose,
        blocks(rows // 8, _EIGHTS) * blocks(width, _EIGHTS),
        kept,
        indices,
        column_mask,
        codec.as_integers(transposed),
        transposed_indices,
        rows // 8,
        width,
        HELD=column_mask is not None,
        LARGEST=torch.iinfo(kept.dtype).max,
        EIGHTS=_EIGHTS,
        num_warps=_WARPS,
        maxnreg=_REGISTERS,
    )
    return transposed, transposed_indices
