"""Kept entries of a dense matrix, as `codec.gather`: the gradient of `values` from dW (arXiv 2405.16325, eq. BWD-1)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slope_dist.sparse import codec
from slope_dist.sparse.kernels.jit import blocks, eights_of, launch
from slope_dist.sparse.kernels.jit.tile import first_of, nibbles_of, split4

_BYTES = 512
"""Metadata bytes to a program of 128 threads: each loads four times 16 bytes of 16-bit entries."""


@triton.jit
def _gather(dense, indices, kept, width, BYTES: tl.constexpr):
    start = first_of(BYTES)
    left = tl.minimum(width - start, BYTES).to(tl.int32)
    byte = tl.arange(0, BYTES)
    entry = tl.arange(0, 8 * BYTES)
    code = nibbles_of(tl.load(indices + start + byte, mask=byte < left, other=0))
    a, b, c, d = split4(tl.load(dense + start * 8 + entry, mask=entry < left * 8, other=0))
    first, second = code & 3, code >> 2
    pair = tl.join(
        tl.where(first == 0, a, tl.where(first == 1, b, c)), tl.where(second == 1, b, tl.where(second == 2, c, d))
    )
    slot = tl.arange(0, 4 * BYTES)
    tl.store(kept + start * 4 + slot, pair.reshape([4 * BYTES]), mask=slot < left * 4)


def gather(dense: Tensor, indices: Tensor) -> Tensor:
    """Kept entries of a dense matrix, row-major: dense [O, I], indices uint8 [O, I / 8] -> [O, K].

    One pass: reads 2 bytes an element of 16 bits and 1/8 of metadata, writes 1.

    Raises:
        ValueError: if the two do not belong together or are not contiguous.
    """
    rows, width = eights_of(dense, indices, 8)
    kept = torch.empty(rows, 4 * width, dtype=dense.dtype, device=dense.device)
    entries = codec.as_integers(dense), indices, codec.as_integers(kept)
    launch(_gather, blocks(rows * width, _BYTES), *entries, rows * width, BYTES=_BYTES)
    return kept
