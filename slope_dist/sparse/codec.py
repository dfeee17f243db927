"""Packed metadata: which entries of a row are kept, at one bit an element.

2:4 stores, for every group of four, the two ascending 2-bit positions of its kept entries: group g lies in the low (g
even) or high (g odd) half of byte g // 2, first position in the lower two bits. The other patterns store a bit mask,
entry c in bit c % 8 of byte c // 8 (little-endian, as `numpy.packbits(bitorder="little")`). Both take I / 8 bytes a
row, so a cut on a multiple of 8 columns is a cut on a whole byte.

Every product of a step passes through here, so bytes are translated eight columns at a time by tables, and entries
are moved as whole numbers of their width: no arithmetic touches them, and moving 16-bit floats as such is slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from slope_dist.sparse.pattern import SUPPORTED, Pattern

# Multiplied by this, eight bytes of 0 or 1 read as one little-endian number leave their eight bits, in order, on top.
_GATHER_BITS = 0x0102040810204080

_BLOCK = 2**18
"""Kept entries whose columns (8 bytes each) exist at one time. All at once they would outweigh the weight, double a
step's peak memory, and beyond 32 MiB take twice to four times as long: the C library then maps and zeroes them anew."""

_BLOCK_ELSEWHERE = 2**24
"""The same on an accelerator, where a block has to keep the device busy for longer than the host takes to queue it."""

_host_block = _BLOCK

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def blocks_of_accelerators() -> Iterator[None]:
    """Let tensors of the host be taken in an accelerator's blocks, to count what there would be on one."""
    global _host_block
    before, _host_block = _host_block, _BLOCK_ELSEWHERE
    try:
        yield
    finally:
        _host_block = before


def _bits_of_byte(device: torch.device) -> Tensor:
    """Map of a byte of bits to its eight mask entries: bool [256, 8]."""
    return (torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device) & 1).bool()


def _columns_of_byte(n: int, m: int, device: torch.device) -> Tensor:
    """Map of a byte of metadata to the 8 n / m columns (0..7) it keeps, ascending: int64 [256, 8 n / m]."""
    if (n, m) == (2, 4):
        shifts = torch.arange(0, 8, 2, device=device)
        return (torch.arange(256, device=device).unsqueeze(1) >> shifts & 3) + shifts // 4 * 4
    return _bits_of_byte(device).to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, : 8 * n // m]


def _codes_of_bits(device: torch.device) -> Tensor:
    """Map of a byte of bits with two set in each half to its byte of 2:4 codes: uint8 [256, 1]."""
    columns = _columns_of_byte(4, 8, device)
    return ((columns & 3) << torch.arange(0, 8, 2, device=device)).sum(dim=1, keepdim=True).to(torch.uint8)


# A copy to an accelerator would wait for it and could be part of no CUDA graph: there, tables are made anew.
_HOST = torch.device("cpu")
_BITS = _bits_of_byte(_HOST)
_COLUMNS = {(n, m): _columns_of_byte(n, m, _HOST) for n, m in SUPPORTED}
_CODES = _codes_of_bits(_HOST)


def _translate(packed: Tensor, table: Tensor) -> Tensor:
    """Each byte of uint8 [O, W] replaced by its row of a table [256, n]: [O, W * n]."""
    return table.index_select(0, packed.reshape(-1).int()).view(packed.shape[0], -1)


def pack(mask: Tensor, pattern: Pattern) -> Tensor:
    """Pack a mask of kept entries.

    Args:
        mask: bool [O, I], True where an entry is kept; exactly n in every m of a row.
        pattern: the pattern the mask follows.

    Returns:
        uint8 [O, I / 8].

    Raises:
        ValueError: if a group keeps more or fewer than n entries, or I is no multiple of 8.
    """
    rows, columns = mask.shape
    if columns % 8:
        raise ValueError(f"{columns} columns are not a multiple of 8")
    kept = mask.view(rows, columns // pattern.m, pattern.m).sum(dim=2)
    if not bool((kept == pattern.n).all()):
        raise ValueError(f"a group of the mask does not keep exactly {pattern.n} of {pattern.m} entries")
    return encode(mask, pattern)


def encode(mask: Tensor, pattern: Pattern) -> Tensor:
    """`pack` for a mask that is right by construction: nothing is checked, so a compiler can take it whole."""
    packed = pack_bits(mask)
    if not pattern.is_two_four:
        return packed
    return _translate(packed, _CODES if packed.device == _HOST else _codes_of_bits(packed.device))


def pack_bits(mask: Tensor) -> Tensor:
    """Pack any bool mask [O, I] into uint8 [O, I / 8], entry c in bit c % 8 of byte c // 8."""
    eights = mask.contiguous().view(torch.int64)
    return ((eights * _GATHER_BITS) >> 56).to(torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """Undo `pack_bits`: uint8 [O, I / 8] -> bool [O, I]."""
    return _translate(packed, _BITS if packed.device == _HOST else _bits_of_byte(packed.device))


def columns_of(indices: Tensor, pattern: Pattern) -> Tensor:
    """Columns of the kept entries, ascending in each row.

    Args:
        indices: uint8 [O, I / 8] as `pack` made them.
        pattern: the pattern they follow.

    Returns:
        int64 [O, K], usable by `gather` and `scatter` along dimension 1.
    """
    device, size = indices.device, (pattern.n, pattern.m)
    table = _COLUMNS[size] if device == _HOST else _columns_of_byte(*size, device)
    first = torch.arange(0, indices.shape[1] * 8, 8, device=device).repeat_interleave(pattern.kept(8))
    return _translate(indices, table).add_(first)


def mask_of(indices: Tensor, pattern: Pattern) -> Tensor:
    """Undo `pack`: uint8 [O, I / 8] -> bool [O, I]."""
    if not pattern.is_two_four:
        return unpack_bits(indices)
    mask = torch.zeros(indices.shape[0], indices.shape[1] * 8, dtype=torch.bool, device=indices.device)
    return mask.scatter_(1, columns_of(indices, pattern), True)


def check(indices: Tensor, pattern: Pattern) -> None:
    """Refuse metadata that `pack` cannot have made, such as two equal or descending positions.

    Raises:
        ValueError: naming the first bad row.
    """
    if pattern.is_two_four:
        good = ((indices & 3) < (indices >> 2 & 3)) & ((indices >> 4 & 3) < indices >> 6)
    else:
        groups = unpack_bits(indices).view(indices.shape[0], -1, pattern.m)
        good = groups.sum(dim=2) == pattern.n
    bad_rows = (~good.all(dim=1)).nonzero()
    if len(bad_rows):
        raise ValueError(f"row {int(bad_rows[0])} of the metadata is not a valid {pattern} pattern")


def as_integers(tensor: Tensor) -> Tensor:
    """The same memory as signed integers of the same width."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def expand(values: Tensor, indices: Tensor, pattern: Pattern) -> Tensor:
    """Dense matrix with zeros where nothing is kept: values [O, K], indices uint8 [O, I / 8] -> [O, I].

    Not differentiable; the products are (slope_dist.sparse.function).
    """
    entries = as_integers(values)
    dense = entries.new_zeros(indices.shape[0], indices.shape[1] * 8)
    blocks = (_blocks(tensor, values.shape[1]) for tensor in (dense, indices, entries))
    for rows, packed, kept in zip(*blocks, strict=True):
        rows.scatter_(1, columns_of(packed, pattern), kept)
    return dense.view(values.dtype)


def gather(dense: Tensor, indices: Tensor, pattern: Pattern) -> Tensor:
    """Kept entries of a dense matrix, row-major: dense [O, I], indices uint8 [O, I / 8] -> [O, K].

    Not differentiable.
    """
    blocks = (_blocks(tensor, pattern.kept(dense.shape[1])) for tensor in (as_integers(dense), indices))
    parts = [rows.gather(1, columns_of(packed, pattern)) for rows, packed in zip(*blocks, strict=True)]
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).view(dense.dtype)


def _blocks(tensor: Tensor, kept: int) -> tuple[Tensor, ...]:
    """Blocks of a tensor's rows, of `kept` entries each, small enough to bound the 64-bit columns made of them."""
    block = _host_block if tensor.device == _HOST else _BLOCK_ELSEWHERE
    return tensor.split(max(1, block // max(1, kept)))
