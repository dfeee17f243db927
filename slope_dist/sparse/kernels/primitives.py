"""The steps that products are made of, by Triton where it runs and by plain torch elsewhere; 2:4 alone.

Both give the same bits: they move numbers and compare magnitudes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from slope_dist.sparse import codec, pruning
from slope_dist.sparse.pattern import Pattern
from slope_dist.sparse.reference_adamw import adamw_step_reference

TWO_FOUR = Pattern(2, 4)


@cache
def why_no_triton(device_type: str) -> str | None:
    """Why Triton does not run on a kind of device, or None if it does."""
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on CUDA devices only"
    try:
        from slope_dist.sparse.kernels.jit.permute import permute_nibbles

        # Importing it says nothing of the compilers that it needs.
        packed = torch.zeros(1, dtype=torch.uint8, device=device_type)
        permute_nibbles(packed, torch.arange(2, dtype=torch.int32, device=device_type))
    except Exception as error:
        return f"Triton compiles no kernel here ({type(error).__name__}: {str(error).strip().splitlines()[0][:200]})"
    return None


def has_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels, which are written for 16 and 32 bits, run on a tensor where it is."""
    return why_no_triton(tensor.device.type) is None and tensor.element_size() in (2, 4) and tensor.is_contiguous()


def expand(values: Tensor, indices: Tensor) -> Tensor:
    """W^R with zeros where nothing is kept: values [O, K], indices uint8 [O, I / 8] -> [O, I]."""
    if has_triton(values):
        from slope_dist.sparse.kernels.jit.expand import expand as kernel

        return kernel(values, indices)
    return codec.expand(values, indices, TWO_FOUR)


def doubly_pruned(values: Tensor, indices: Tensor, column_mask: Tensor | None) -> Tensor:
    """W^{R,C} with zeros, by the packed column mask uint8 [O, I / 8] or by magnitude now -> [O, I]."""
    if has_triton(values):
        from slope_dist.sparse.kernels.jit.expand import doubly_pruned as kernel

        return kernel(values, indices, column_mask)
    return pruning.doubly_pruned(values, indices, TWO_FOUR, _unpacked(column_mask))


def column_mask(values: Tensor, indices: Tensor) -> Tensor:
    """Which entries of W^R its column mask keeps, by magnitude now: packed uint8 [O, I / 8]."""
    if not has_triton(values):
        return codec.pack_bits(pruning.column_mask(values, indices, TWO_FOUR))
    # Of the scores, which are from 1 up and in the order of the magnitudes, what is not 0 was kept.
    scores = pruning.scores(values).view(values.dtype)
    return codec.pack_bits(codec.as_integers(doubly_pruned(scores, indices, None)) != 0)


def transpose(
    values: Tensor, indices: Tensor, column_mask: Tensor | None, into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(W^{R,C})^T compressed: values [I, O / 2], which lie in `into` if that is given, and indices uint8 [I, O / 8]."""
    if has_triton(values):
        from slope_dist.sparse.kernels.jit.transpose import transpose as kernel

        return kernel(values, indices, column_mask, into)
    transposed, packed = pruning.doubly_pruned_transpose(values, indices, TWO_FOUR, _unpacked(column_mask))
    return transposed if into is None else into.copy_(transposed), packed


def gather(dense: Tensor, indices: Tensor, kept: Tensor | None = None) -> Tensor:
    """Kept entries of a dense matrix: [O, I], indices uint8 [O, I / 8] -> [O, K], into `kept` if that is given."""
    if has_triton(dense):
        from slope_dist.sparse.kernels.jit.gather import gather as kernel

        return kernel(dense, indices, kept)
    gathered = codec.gather(dense, indices, TWO_FOUR)
    return gathered if kept is None else kept.copy_(gathered)


def adamw_step(weight: Tensor) -> Callable[..., None]:
    """The AdamW that updates a compressed weight and its transpose on a device: see `adamw_step_reference`."""
    if has_triton(weight):
        from slope_dist.sparse.kernels.jit.adamw import adamw_step as kernel

        return kernel
    return adamw_step_reference


def _unpacked(column_mask: Tensor | None) -> Tensor | None:
    return None if column_mask is None else codec.unpack_bits(column_mask)


def random_matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A compressed matrix to measure with: normal values [O, K], any valid metadata uint8 [O, I / 8]."""
    # The six ways to keep two of four, as two 2-bit positions, the first in the low bits.
    codes = torch.tensor([first | second << 2 for second in range(4) for first in range(second)], dtype=torch.uint8)
    generator = torch.Generator(device).manual_seed(20240525)
    drawn = torch.randint(6, (rows, columns // 4), device=device, generator=generator)
    nibbles = codes.to(device)[drawn].view(rows, -1, 2)
    indices = nibbles[..., 0] | nibbles[..., 1] << 4
    values = torch.randn(rows, columns // 2, device=device, generator=generator).to(dtype)
    return values, indices.contiguous()
