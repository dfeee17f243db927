"""Triton kernels for 2:4. These modules import triton at their top and are imported where they are first needed.

Each launcher has a plain-torch twin (codec, pruning) that gives the same bits, and takes metadata as `codec.pack` makes
it: of the two ascending positions of a group the first is never 3 and the second never 0.

Block sizes are constants, chosen so that each thread moves 16 or 8 bytes at a time and has a few such loads under way;
nothing is timed. Each kernel is compiled once for each width of entries, and again for sizes that no 16 divides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slope_dist.sparse.kernels.vendor import on

_WIDTHS = (2, 4)
"""Bytes of an entry that the kernels are written for."""


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Start `programs` programs of a kernel on the device of its first argument, which need not be the current one."""
    if programs:
        with on(args[0].device):
            kernel[(programs,)](*args, **constants)


def eights_of(entries: Tensor, indices: Tensor, per_byte: int, column_mask: Tensor | None = None) -> tuple[int, int]:
    """Rows O and bytes a row I / 8 of a matrix.

    Args:
        entries: [O, per_byte * I / 8]: 8 a byte where dense, 4 where compressed; of 16 or 32 bits.
        indices: uint8 [O, I / 8].
        per_byte: entries to each byte of metadata.
        column_mask: packed uint8 [O, I / 8], if held.

    Raises:
        ValueError: if they do not belong together, are not contiguous, or lie on different devices.
    """
    if entries.element_size() not in _WIDTHS:
        raise ValueError(f"the kernels move entries of 16 or 32 bits, not {entries.dtype}")
    packed = [indices] if column_mask is None else [indices, column_mask]
    for tensor in packed:
        if tensor.dtype != torch.uint8 or tensor.dim() != 2 or tensor.shape != indices.shape:
            raise ValueError(f"metadata must be uint8 [O, I / 8], not {tensor.dtype} {list(tensor.shape)}")
    rows, width = indices.shape
    if entries.shape != (rows, per_byte * width):
        raise ValueError(f"entries {list(entries.shape)} do not belong to metadata {list(indices.shape)}")
    for tensor in [entries, *packed]:
        if tensor.device != entries.device:
            raise ValueError(f"entries are on {entries.device} and their metadata is on {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"a tensor {list(tensor.shape)} with strides {tensor.stride()} is not contiguous")
    return rows, width


def blocks(size: int, block: int) -> int:
    """Blocks that cover `size`."""
    return -(-size // block)
