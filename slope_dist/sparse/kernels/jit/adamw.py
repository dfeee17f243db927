"""AdamW that writes both copies of a 2:4 weight in one pass (twin: `reference_adamw.adamw_step_reference`).

A program owns ROWS x GROUPS tiles of eight rows by one group of four columns. It takes the eight rows of its tiles one
after another: contiguous loads, the update, contiguous stores. What was stored in the live copy stays in registers, is
laid out over its four columns, and four rows compete for the two slots that a column's group has. Nothing is read
twice and no dense matrix is written. An entry is moved as the integer that has its bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from slope_dist.sparse import codec
from slope_dist.sparse.kernels.vendor import on

ROWS, GROUPS = 16, 16
"""Tiles of a program. 16 tiles are 128 rows: a row of the transpose gets 64 entries, whole lines of the cache."""


@triton.jit
def _bits_of(numbers, KIND: tl.constexpr):
    """fp32 -> the bits of the live dtype, as an integer of its width, rounded to nearest even."""
    if KIND == "float32":
        bits = numbers.to(tl.int32, bitcast=True)
    elif KIND == "float16":
        bits = numbers.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        # By hand, since Triton's interpreter truncates.
        word = numbers.to(tl.int32, bitcast=True)
        rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
        bits = tl.where(numbers != numbers, 0x7FC0, rounded).to(tl.int16)
    return bits


@triton.jit
def _row(
    states,
    copies,
    numbers,
    tile,
    entry,
    group,
    shape,
    NUMBER: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    KIND: tl.constexpr,
    ALIASED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Update row NUMBER of every tile.

    Returns what the transpose needs of it, each [ROWS, GROUPS]: the bits of each group's two entries in the live copy,
    and its code, with the group's four bits of a held column mask above the four of the code.
    """
    master, exp_avg, exp_avg_sq, grad = states
    values, indices, column_mask = copies
    scale, decay, step_size, root, eps = numbers
    rows, kept = shape
    row = (tile * 8 + NUMBER).to(tl.int64)
    at = row * kept + entry
    mask = (tile * 8 < rows) & (entry < kept)
    gradient = tl.load(grad + at, mask, other=0.0).to(tl.float32) * scale
    first = tl.load(exp_avg + at, mask, other=0.0)
    second = tl.load(exp_avg_sq + at, mask, other=0.0)
    weight = tl.load(master + at, mask, other=0.0)
    first += (gradient - first) * (1 - BETA1)
    second = second * BETA2 + gradient * gradient * (1 - BETA2)
    denominator = tl.div_rn(tl.sqrt_rn(second), root) + eps
    weight = weight * decay - tl.div_rn(first * step_size, denominator)
    tl.store(exp_avg + at, first, mask)
    tl.store(exp_avg_sq + at, second, mask)
    bits = _bits_of(weight, KIND)
    if not ALIASED:
        tl.store(master + at, weight, mask)
    tl.store(values + at, bits, mask)
    low, high = tl.split(tl.reshape(bits, [bits.shape[0], bits.shape[1] // 2, 2]))
    code = tl.zeros_like(low).to(tl.int32)
    if TRANSPOSED:
        byte, inside = row * (kept // 4) + group // 2, (tile * 8 < rows) & (group * 2 < kept)
        code = (tl.load(indices + byte, inside, other=0).to(tl.int32) >> (group % 2 * 4)) & 15
        if MASKED:
            held = tl.load(column_mask + byte, inside, other=0).to(tl.int32) >> (group % 2 * 4)
            code |= (held & 15) << 4
    return low, high, code


@triton.jit
def _entry(row, COLUMN: tl.constexpr, MASKED: tl.constexpr):
    """A row's entry in a column of its groups, 0 where it keeps none, and its score, 0 where it may take no slot."""
    low, high, code = row
    is_low, is_high = (code & 3) == COLUMN, ((code >> 2) & 3) == COLUMN
    bits = tl.where(is_low, low, tl.where(is_high, high, tl.zeros_like(low)))
    if MASKED:
        score = (code >> (4 + COLUMN)) & 1
        bits = tl.where(score > 0, bits, tl.zeros_like(bits))
    else:
        # Not above the largest but one, so that adding one, which tells 0 from nothing, does not overflow.
        largest: tl.constexpr = 2 ** (low.dtype.primitive_bitwidth - 1) - 1
        score = tl.where(is_low | is_high, tl.minimum(bits.to(tl.int32) & largest, largest - 1) + 1, 0)
    return bits, score


@triton.jit
def _two_of_four(row0, row1, row2, row3, COLUMN: tl.constexpr, MASKED: tl.constexpr):
    """The two best by score, ties to the first, in ascending order: entry, entry, and the code of their places.

    Where fewer than two have a score, the lowest places without one fill up; their entries are zeros.
    """
    x0, s0 = _entry(row0, COLUMN, MASKED)
    x1, s1 = _entry(row1, COLUMN, MASKED)
    x2, s2 = _entry(row2, COLUMN, MASKED)
    x3, s3 = _entry(row3, COLUMN, MASKED)
    b01, b02, b03 = (s0 < s1).to(tl.int32), (s0 < s2).to(tl.int32), (s0 < s3).to(tl.int32)
    b12, b13, b23 = (s1 < s2).to(tl.int32), (s1 < s3).to(tl.int32), (s2 < s3).to(tl.int32)
    is0, is1 = b01 + b02 + b03 < 2, 1 - b01 + b12 + b13 < 2
    is2, is3 = 2 - b02 - b12 + b23 < 2, 3 - b03 - b13 - b23 < 2
    first = tl.where(is0, x0, tl.where(is1, x1, x2))
    second = tl.where(is3, x3, tl.where(is2, x2, x1))
    return first, second, tl.where(is0, 0, tl.where(is1, 1, 2)) | tl.where(is3, 12, tl.where(is2, 8, 4))


@triton.jit
def _adamw_kernel(
    master,
    exp_avg,
    exp_avg_sq,
    grad,
    values,
    indices,
    transposed_values,
    transposed_indices,
    column_mask,
    step,
    grad_scale,
    lr,
    decay,
    eps,
    rows,
    kept,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    KIND: tl.constexpr,
    ALIASED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    MASKED: tl.constexpr,
    STEP_LOADED: tl.constexpr,
    SCALE_LOADED: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    if STEP_LOADED:
        step = tl.load(step)
    if SCALE_LOADED:
        grad_scale = tl.load(grad_scale)
    # In fp64: 1 - beta ** step loses most of its digits in fp32 while the step is small.
    correction1 = 1.0 - tl.exp(tl.full((), LOG_BETA1, tl.float64) * step)
    correction2 = 1.0 - tl.exp(tl.full((), LOG_BETA2, tl.float64) * step)
    numbers = grad_scale, decay, (lr / correction1).to(tl.float32), tl.sqrt(correction2).to(tl.float32), eps

    tile = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    entry = tl.program_id(1) * (2 * GROUPS) + tl.arange(0, 2 * GROUPS)[None, :]
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :]
    states, copies, shape = (master, exp_avg, exp_avg_sq, grad), (values, indices, column_mask), (rows, kept)
    # Eight variables: rows in registers can not be indexed.
    row0 = _row(states, copies, numbers, tile, entry, group, shape, 0, BETA1, BETA2, KIND, ALIASED, TRANSPOSED, MASKED)
    row1 = _row(states, copies, numbers, tile, entry, group, shape, 1, BETA1, BETA2, KIND, ALIASED, TRANSPOSED, MASKED)
    row2 = _row(states, copies, numbers, tile, entry, group, shape, 2, BETA1, BETA2, KIND, ALIASED, TRANSPOSED, MASKED)
    row3 = _row(states, copies, numbers, tile, entry, group, shape, 3, BETA1, BETA2, KIND, ALIASED, TRANSPOSED, MASKED)
    row4 = _row(states, copies, numbers, tile, entry, group, shape, 4, BETA1, BETA2, KIND, ALIASED, TRANSPOSED, MASKED)
    row5 = _row(states, copies, numbers, tile, entry, group, shape, 5, BETA1, BETA2, KIND, ALIASED, TRANSPOSED, MASKED)
    row6 = _row(states, copies, numbers, tile, entry, group, shape, 6, BETA1, BETA2, KIND, ALIASED, TRANSPOSED, MASKED)
    row7 = _row(states, copies, numbers, tile, entry, group, shape, 7, BETA1, BETA2, KIND, ALIASED, TRANSPOSED, MASKED)
    if TRANSPOSED:
        inside = (tile * 8 < rows) & (group * 2 < kept)
        slot = tl.arange(0, 4)[None, None, :]
        for column in tl.static_range(4):
            upper = _two_of_four(row0, row1, row2, row3, column, MASKED)
            lower = _two_of_four(row4, row5, row6, row7, column, MASKED)
            to = (group * 4 + column).to(tl.int64) * (rows // 8) + tile
            tl.store(transposed_indices + to, (upper[2] | (lower[2] << 4)).to(tl.uint8), inside)
            four = tl.join(tl.join(upper[0], lower[0]), tl.join(upper[1], lower[1]))
            four = tl.reshape(four, [ROWS, GROUPS, 4])
            tl.store(transposed_values + to[:, :, None] * 4 + slot, four, inside[:, :, None])


def adamw_step(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    indices: Tensor,
    values: Tensor,
    transposed: tuple[Tensor, Tensor] | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: Tensor | float,
    grad_scale: Tensor | float = 1.0,
    column_mask: Tensor | None = None,
) -> None:
    """`adamw_step_reference` in one kernel: same arguments, same result within rounding, and no host synchronisation.

    All tensors are contiguous, O and I multiples of 8, and a `step` or `grad_scale` that is a tensor is an fp32 scalar
    on the device of the weight. After the update the transpose is, bit for bit, the doubly pruned transpose of the
    live copy.
    """
    rows, width = indices.shape
    states = (master, exp_avg, exp_avg_sq, grad, values)
    assert rows % 8 == 0 and all(tensor.shape == (rows, width * 4) for tensor in states)
    assert all(tensor.is_contiguous() for tensor in (*states, indices, *(transposed or ())))
    assert all(tensor.dtype == torch.float32 for tensor in states[:3])
    on_device = [isinstance(scalar, Tensor) for scalar in (step, grad_scale)]
    # Triton launches on the current device.
    with on(master.device):
        _adamw_kernel[triton.cdiv(rows, 8 * ROWS), triton.cdiv(width * 2, GROUPS)](
            master,
            exp_avg,
            exp_avg_sq,
            grad,
            codec.as_integers(values),
            indices,
            None if transposed is None else codec.as_integers(transposed[0]),
            None if transposed is None else transposed[1],
            column_mask,
            step if on_device[0] else float(step),
            grad_scale if on_device[1] else float(grad_scale),
            lr,
            1 - lr * weight_decay,
            eps,
            rows,
            width * 4,
            BETA1=betas[0],
            BETA2=betas[1],
            LOG_BETA1=math.log(betas[0]) if betas[0] else -math.inf,
            LOG_BETA2=math.log(betas[1]) if betas[1] else -math.inf,
            KIND=str(values.dtype).removeprefix("torch."),
            ALIASED=values.data_ptr() == master.data_ptr(),
            TRANSPOSED=transposed is not None,
            MASKED=column_mask is not None,
            STEP_LOADED=on_device[0],
            SCALE_LOADED=on_device[1],
            ROWS=ROWS,
            GROUPS=GROUPS,
            num_warps=8,
        )
