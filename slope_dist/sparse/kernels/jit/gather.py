"""Kept entries of a dense matrix, as `codec.gather`: the gradient of `values` from dW (arXiv 2405.16325, eq. BWD-1)."""

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
from slope_dist.sparse.kernels.jit.tile import first_of, left_of, nibbles_of, split4

_BYTES = 128
"""Metadata bytes to each step of a program of 128 threads: a thread has one byte of them and its eight entries, which
at 16 bits it loads at once. So no value passes from one thread to another."""

_STEPS = 4
"""Steps of a program, whose loads are all under way before the first is used."""


@triton.jit
def _gather(dense, indices, kept, size, STEPS: tl.constexpr, BYTES: tl.constexpr):
    byte = tl.arange(0, BYTES)
    entry = tl.arange(0, 8 * BYTES)
    slot = tl.arange(0, 4 * BYTES)
    loaded = ()
    for step in tl.static_range(STEPS):
        start = first_of(STEPS * BYTES) + step * BYTES
        left = left_of(start, size, BYTES)
        packed = tl.load(indices + start + byte, mask=byte < left, other=0)
        loaded = loaded + ((packed, tl.load(dense + start * 8 + entry, mask=entry < left * 8, other=0)),)
    for step in tl.static_range(STEPS):
        start = first_of(STEPS * BYTES) + step * BYTES
        left = left_of(start, size, BYTES)
        code = nibbles_of(loaded[step][0])
        a, b, c, d = split4(loaded[step][1])
        first, second = code & 3, code >> 2
        left_entry = tl.where(first == 0, a, tl.where(first == 1, b, c))
        right_entry = tl.where(second == 1, b, tl.where(second == 2, c, d))
        pairs = tl.join(left_entry, right_entry).reshape([4 * BYTES])
        tl.store(kept + start * 4 + slot, pairs, mask=slot < left * 4)


def gather(dense: Tensor, indices: Tensor, kept: Tensor | None = None) -> Tensor:
    """Kept entries of a dense matrix, row-major: dense [O, I], indices uint8 [O, I / 8] -> [O, K], in `kept` if given.

    One pass: reads 2 bytes an element of 16 bits and 1/8 of metadata, writes 1.

    Raises:
        ValueError: if the two do not belong together or are not contiguous.
    """
    rows, width = eights_of(dense, indices, 8)
    if kept is None:
        kept = torch.empty(rows, 4 * width, dtype=dense.dtype, device=dense.device)
    elif (kept.shape, kept.dtype, kept.device) != ((rows, 4 * width), dense.dtype, dense.device):
        raise ValueError(f"kept entries of {list(dense.shape)} do not go into {kept.dtype} {list(kept.shape)}")
    elif not kept.is_contiguous():
        raise ValueError(f"a tensor {list(kept.shape)} with strides {kept.stride()} is not contiguous")
    entries = codec.as_integers(dense), indices, codec.as_integers(kept)
    launch(_gather, blocks(rows * width, _STEPS * _BYTES), *entries, rows * width, STEPS=_STEPS, BYTES=_BYTES)
    return kept
