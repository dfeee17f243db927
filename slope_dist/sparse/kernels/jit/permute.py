"""Metadata in another order of groups: each 4-bit code moves whole (a vendor's layout from ours, and back)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slope_dist.sparse.kernels.jit import blocks, launch
from slope_dist.sparse.kernels.jit.tile import first_of, left_of

_BYTES = 512
"""Bytes to a program of 128 threads: each reads the sources of two bytes, 16 bytes, twice."""


@triton.jit
def _permute(packed, source, permuted, size, period, LONG: tl.constexpr, BYTES: tl.constexpr):
    start = first_of(BYTES)
    left = left_of(start, size, BYTES)
    nibble = tl.arange(0, 2 * BYTES)
    inside = nibble < left * 2
    # A matrix may have more nibbles than 32 bits count, a period has not: one long remainder, and none a nibble.
    within = (start * 2 % period).to(tl.int32) + nibble
    within = tl.where(within >= period, within - period, within) if LONG else within % period
    place = start * 2 + (nibble - within + tl.load(source + within, mask=inside, other=0))
    moved = tl.load(packed + (place >> 1), mask=inside, other=0).to(tl.int32) >> (place & 1) * 4 & 15
    low, high = moved.reshape([BYTES, 2]).split()
    byte = tl.arange(0, BYTES)
    tl.store(permuted + start + byte, (low | high << 4).to(tl.uint8), mask=byte < left)


def permute_nibbles(packed: Tensor, source: Tensor) -> Tensor:
    """Nibble j of each block of P becomes the block's nibble source[j]; nibble 2 b is the low half of byte b.

    A byte of the result takes 8 bytes of `source`, which stays in a cache where it repeats, two reads anywhere in the
    block and a write.

    Args:
        packed: uint8 [N].
        source: int32 [P], each from 0 to P - 1; P divides 2 N.

    Returns:
        uint8 [N].

    Raises:
        ValueError: if they do not belong together or are not contiguous.
    """
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise ValueError(f"packed nibbles must be uint8 [N], not {packed.dtype} {list(packed.shape)}")
    period = source.numel()
    if source.dtype != torch.int32 or source.dim() != 1 or not period or 2 * len(packed) % period:
        raise ValueError(
            f"their sources must be int32 [P] with P a divisor of {2 * len(packed)}, not {source.dtype} "
            f"{list(source.shape)}"
        )
    if source.device != packed.device:
        raise ValueError(f"nibbles are on {packed.device} and their sources on {source.device}")
    if not (packed.is_contiguous() and source.is_contiguous()):
        raise ValueError("nibbles and their sources must be contiguous")
    permuted = torch.empty(len(packed), dtype=torch.uint8, device=packed.device)
    long = period >= 2 * _BYTES
    launch(
        _permute, blocks(len(packed), _BYTES), packed, source, permuted, len(packed), period, LONG=long, BYTES=_BYTES
    )
    return permuted
