"""Skinny product Y = X W^T of 1 to 32 tokens over a compressed W, with the adapter (twin: `reference.forward`).

With few tokens the time is that of reading W: 1.125 bytes an element in 16 bits against 2. So every byte of W is read
once, at full width: a unit, which is one byte of codes and the four values of its eight columns, is one 8-byte load
and one 1-byte load, and is taken apart in registers. Tensor cores have no 2:4 product that Triton could name, and
need none here.

- Up to FEW tokens: of the four columns of a group in X, two conditional moves a value and token choose the one that
  it multiplies; a thread has X in registers for all rows of the program. The cost grows with every token.
- Above: a unit becomes eight dense columns in registers, and column c of all units, [rows, units], is an operand of
  its own for the tensor cores, against column c of X. So nothing is interleaved, and the cost does not grow with the
  tokens, which are padded to 16 or 32.

Programs that share rows (splits along I) write partial sums to memory, where a second kernel adds them in a fixed
order: no atomics, the same result each time. X down^T takes part as extra programs of the first kernel, in partial
sums as well, and the second adds (X down^T scale) up^T and the bias, in fp32. So there are at most two launches, and
without adapter and splits there is one.

A finite X gives what the reference gives within rounding. Where X is infinite or NaN, so is what kept entries make of
it; a pruned entry makes NaN of it in the reference and above FEW tokens, but takes no part up to FEW.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slope_dist.sparse.kernels.vendor import on

TOKENS = 32
"""The most tokens of a product."""

FEW = 2
"""Tokens up to which multiplying without tensor cores takes fewer instructions than memory leaves time for."""

PROGRAMS = 256
"""As many are wanted: two for each multiprocessor, which its registers hold, of an H100 (132; an A100 has 108)."""

LOW_SPLITS = 16
"""The most parts of I in which X down^T is made."""

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _four(words, at, mask, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Four neighbours as four tensors: word `at` of 8 bytes where WIDE, else entries 4 at ... 4 at + 3."""
    if WIDE:
        word = tl.load(words + at, mask, other=0)
        n0 = word.to(tl.int16).to(DTYPE, bitcast=True)
        n1 = (word >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        n2 = (word >> 32).to(tl.int16).to(DTYPE, bitcast=True)
        n3 = (word >> 48).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        n0 = tl.load(words + at * 4, mask, other=0.0)
        n1 = tl.load(words + at * 4 + 1, mask, other=0.0)
        n2 = tl.load(words + at * 4 + 2, mask, other=0.0)
        n3 = tl.load(words + at * 4 + 3, mask, other=0.0)
    return n0, n1, n2, n3


@triton.jit
def _selected(x, token, unit, units, inside, codes, kept, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Each unit's kept entries times those of a token that they meet: fp32 [ROWS, UNITS]."""
    at = token * (2 * units) + 2 * unit
    left = _met(_four(x, at, inside, DTYPE, WIDE), codes, kept[0], kept[1])
    return left + _met(_four(x, at + 1, inside, DTYPE, WIDE), codes >> 4, kept[2], kept[3])


@triton.jit
def _met(x, code, low, high):
    """A group's two kept entries times what they meet of its four columns in X. Positions ascend: 0 to 2, 1 to 3."""
    x0, x1, x2, x3 = x[0][None, :], x[1][None, :], x[2][None, :], x[3][None, :]
    first = tl.where((code & 2) != 0, x2, tl.where((code & 1) != 0, x1, x0))
    second = tl.where((code & 8) != 0, tl.where((code & 4) != 0, x3, x2), x1)
    return low.to(tl.float32) * first.to(tl.float32) + high.to(tl.float32) * second.to(tl.float32)


@triton.jit
def _by_selection(
    x, values, indices, row, start, stop, units, mask_row, DTYPE: tl.constexpr, WIDE: tl.constexpr,
    TOKENS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Sums over the units [start, stop) for one or two tokens: fp32 [TOKENS, ROWS]."""
    first_token = tl.zeros([row.shape[0], UNITS], tl.float32)
    second_token = tl.zeros([row.shape[0], UNITS], tl.float32)
    for first in range(start, stop, UNITS):
        unit = first + tl.arange(0, UNITS)
        inside = unit < stop
        # One unit a thread and row, though more neighbours would fit into a load: then codes, values and X have one
        # layout, a thread uses X for all rows, and nothing passes through shared memory.
        at = tl.max_contiguous(row.to(tl.int64)[:, None] * units + unit[None, :], [1, 1])
        mask = mask_row[:, None] & inside[None, :]
        codes = tl.load(indices + at, mask, other=0).to(tl.int32)
        kept = _four(values, at, mask, DTYPE, WIDE)
        first_token += _selected(x, 0, unit, units, inside, codes, kept, DTYPE, WIDE)
        if TOKENS == 2:
            second_token += _selected(x, 1, unit, units, inside, codes, kept, DTYPE, WIDE)
    sums = tl.sum(first_token, axis=1)[None, :]
    if TOKENS == 2:
        sums = tl.trans(tl.join(tl.sum(first_token, axis=1), tl.sum(second_token, axis=1)))
    return sums


@triton.jit
def _by_expansion(
    x, values, indices, token, row, start, stop, units, mask_row, mask_token, DTYPE: tl.constexpr, WIDE: tl.constexpr,
    UNITS: tl.constexpr,
):  # fmt: skip
    """Sums over the units [start, stop): fp32 [TOKENS, ROWS], on tensor cores."""
    sums = tl.zeros([row.shape[0], token.shape[0]], tl.float32)
    for first in range(start, stop, UNITS):
        unit = first + tl.arange(0, UNITS)
        inside = unit < stop
        at = row.to(tl.int64)[:, None] * units + unit[None, :]
        mask = mask_row[:, None] & inside[None, :]
        codes = tl.load(indices + at, mask, other=0).to(tl.int32)
        kept = _four(values, at, mask, DTYPE, WIDE)
        for half in tl.static_range(2):
            at_x = token[:, None] * (2 * units) + 2 * unit[None, :] + half
            columns = _four(x, at_x, mask_token[:, None] & inside[None, :], DTYPE, WIDE)
            code = codes >> (4 * half)
            for column in tl.static_range(4):
                high = tl.where(((code >> 2) & 3) == column, kept[2 * half + 1], 0.0)
                entries = tl.where((code & 3) == column, kept[2 * half], high).to(DTYPE)
                sums = tl.dot(entries, tl.trans(columns[column]), sums, input_precision="ieee")
    return tl.trans(sums)


@triton.jit
def _low_block(
    x, down, low, program, tokens, columns, rank, chunk, TOKENS: tl.constexpr
):  # fmt: skip
    """Partial sums of X down^T for 16 rows of `down` and one part of I, on tensor cores whatever the tokens."""
    blocks = tl.cdiv(rank, 16)
    split = program // blocks
    row, token = program % blocks * 16 + tl.arange(0, 16), tl.arange(0, TOKENS)
    mask_row, mask_token = row < rank, token < tokens
    sums = tl.zeros([16, TOKENS], tl.float32)
    stop = tl.minimum(columns, (split + 1) * chunk)
    for first in range(split * chunk, stop, 128):
        column = first + tl.arange(0, 128)
        inside = column < stop
        at_x, at_down = token[:, None] * columns + column[None, :], row[:, None] * columns + column[None, :]
        right = tl.load(x + at_x, mask_token[:, None] & inside[None, :], other=0.0)
        left = tl.load(down + at_down, mask_row[:, None] & inside[None, :], other=0.0)
        sums = tl.dot(left, tl.trans(right), sums, input_precision="ieee")
    to = (split * tokens + token)[None, :] * rank + row[:, None]
    tl.store(low + to, sums, mask_row[:, None] & mask_token[None, :])


@triton.jit
def _block(
    x, values, indices, bias, out, program, tokens, rows, units, chunk, DTYPE: tl.constexpr, WIDE: tl.constexpr,
    BIASED: tl.constexpr, FEW: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Partial sums of X W^T for ROWS rows of W and one part of I."""
    blocks = tl.cdiv(rows, ROWS)
    split = program // blocks
    row, token = program % blocks * ROWS + tl.arange(0, ROWS), tl.arange(0, TOKENS)
    mask_row, mask_token = row < rows, token < tokens
    start, stop = split * chunk, tl.minimum(units, (split + 1) * chunk)
    if FEW:
        sums = _by_selection(x, values, indices, row, start, stop, units, mask_row, DTYPE, WIDE, TOKENS, UNITS)
    else:
        sums = _by_expansion(x, values, indices, token, row, start, stop, units, mask_row, mask_token, DTYPE, WIDE,
                             UNITS)  # fmt: skip
    if BIASED:
        sums += tl.load(bias + row, mask_row, other=0.0).to(tl.float32)[None, :]
    to = (split * tokens + token)[:, None] * rows + row[None, :]
    tl.store(out + to, sums.to(out.dtype.element_ty), mask_token[:, None] & mask_row[None, :])


@triton.jit
def _product_kernel(
    x,
    words,
    values,
    indices,
    bias,
    down,
    out,
    low,
    tokens,
    rows,
    units,
    rank,
    chunk,
    low_chunk,
    low_programs,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    BIASED: tl.constexpr,
    RANKED: tl.constexpr,
    FEW: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    program = tl.program_id(0)
    if RANKED:
        if program < low_programs:
            _low_block(x, down, low, program, tokens, units * 8, rank, low_chunk, 16 if FEW else TOKENS)
        else:
            _block(words, values, indices, bias, out, program - low_programs, tokens, rows, units, chunk, DTYPE, WIDE,
                   BIASED, FEW, TOKENS, ROWS, UNITS)  # fmt: skip
    else:
        _block(words, values, indices, bias, out, program, tokens, rows, units, chunk, DTYPE, WIDE, BIASED, FEW,
               TOKENS, ROWS, UNITS)  # fmt: skip


@triton.jit
def _finish_kernel(
    partial, low, up, bias, out, scale, tokens, rows, rank, splits, low_splits, BIASED: tl.constexpr,
    RANKED: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    row, token = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    sums = tl.zeros([ROWS], tl.float32)
    for split in range(splits):
        sums += tl.load(partial + (split * tokens + token) * rows + row, row < rows, other=0.0)
    if RANKED:
        for first in range(0, rank, RANK):
            rung = first + tl.arange(0, RANK)
            factor = tl.zeros([RANK], tl.float32)
            for split in range(low_splits):
                factor += tl.load(low + (split * tokens + token) * rank + rung, rung < rank, other=0.0)
            left = tl.load(up + row[:, None] * rank + rung[None, :], (row < rows)[:, None] & (rung < rank)[None, :],
                           other=0.0)  # fmt: skip
            sums += tl.sum(left.to(tl.float32) * (factor * scale)[None, :], axis=1)
    if BIASED:
        sums += tl.load(bias + row, row < rows, other=0.0).to(tl.float32)
    tl.store(out + token * rows + row, sums.to(out.dtype.element_ty), row < rows)


def decode(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    *,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Y = X W^T (+ (X down^T scale) up^T) (+ bias) over a compressed W, accumulated in fp32.

    Args:
        x: [T, I], T from 1 to 32, I a multiple of 8; fp32, fp16 or bf16.
        values: [O, K] of the dtype of `x`, contiguous.
        indices: uint8 [O, I / 8], contiguous: 2:4 codes.
        bias: [O].
        down: [R, I] of the dtype of `x`, the adapter's first factor; `up` [O, R] is its second. Both or none.
        up: see `down`.
        scale: of the adapter.

    Returns:
        [T, O] of the dtype of `x`.
    """
    (tokens, columns), rows, units = x.shape, indices.shape[0], indices.shape[1]
    assert 1 <= tokens <= TOKENS and columns == units * 8 and x.dtype == values.dtype
    assert values.is_contiguous() and indices.is_contiguous()
    x = x.contiguous()
    out = x.new_empty(tokens, rows)
    rank = 0 if down is None else down.shape[0]
    few = tokens <= FEW
    rows_of_program, units_of_step = (4, min(256, triton.next_power_of_2(units))) if few else (32, 32)
    row_blocks = triton.cdiv(rows, rows_of_program)
    splits = 1 if few else max(1, min(PROGRAMS // row_blocks, triton.cdiv(units, units_of_step)))
    low_splits = min(LOW_SPLITS, triton.cdiv(columns, 512))
    low_programs = triton.cdiv(rank, 16) * low_splits
    whole = splits == 1 and not rank
    partial = out if whole else x.new_empty(splits, tokens, rows, dtype=torch.float32)
    low = x.new_empty(low_splits, tokens, rank, dtype=torch.float32) if rank else None
    wide = x.element_size() == 2 and x.data_ptr() % 8 == 0 and values.data_ptr() % 8 == 0
    # Triton launches on the current device.
    with on(x.device):
        _product_kernel[(low_programs + row_blocks * splits,)](
            x,
            x.view(torch.int64) if wide else x,
            values.view(torch.int64) if wide else values,
            indices,
            bias if whole else None,
            down.contiguous() if down is not None else None,
            partial,
            low,
            tokens,
            rows,
            units,
            rank,
            triton.cdiv(triton.cdiv(units, units_of_step), splits) * units_of_step,
            triton.cdiv(triton.cdiv(columns, 128), low_splits) * 128,
            low_programs,
            DTYPE=_DTYPES[x.dtype],
            WIDE=wide,
            BIASED=whole and bias is not None,
            RANKED=rank > 0,
            FEW=few,
            TOKENS=triton.next_power_of_2(tokens) if few else (16 if tokens <= 16 else 32),
            ROWS=rows_of_program,
            UNITS=units_of_step,
        )
        if not whole:
            _finish_kernel[triton.cdiv(rows, 64), tokens](
                partial,
                low,
                up.contiguous() if up is not None else None,
                bias,
                out,
                scale,
                tokens,
                rows,
                rank,
                splits,
                low_splits,
                BIASED=bias is not None,
                RANKED=rank > 0,
                ROWS=64,
                RANK=min(64, triton.next_power_of_2(max(1, rank))),
            )
    return out
