"""Packed metadata: which entries of a row are kept, at one bit an element.

2:4 stores, for every group of four, the two ascending 2-bit positions of its kept entries: group g lies in the low (g
even)
or high (g odd) half of byte g // 2, first position in the lower two bits. The other patterns store a bit mask, entry
c in
bit c % 8 of byte c // 8 (little-endian, as `numpy.packbits(bitorder="little")`). Both take I / 8 bytes a row, so a
cut on a multiple of 8 columns is a cut on a whole byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slope_dist.sparse.pattern import Pattern

_NIBBLE_BITS = torch.tensor([1, 2, 4, 8], dtype=torch.uint8)
_BYTE_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def _code_of_nibble() -> Tensor:
    """Map of a 4-bit mask with two bits set to its code; other masks map to 0 and are refused before the look-up."""
    codes = torch.zeros(16, dtype=torch.uint8)
    for low in range(4):
        for high in range(low + 1, 4):
            codes[(1 << low) | (1 << high)] = low | (high << 2)
    return codes


def _columns_of_byte() -> Tensor:
    """Map of a byte of codes to the four columns (0..7) it keeps."""
    byte = torch.arange(256)
    return torch.stack([byte & 3, byte >> 2 & 3, (byte >> 4 & 3) + 4, (byte >> 6 & 3) + 4], dim=1)


_CODE_OF_NIBBLE = _code_of_nibble()
_COLUMNS_OF_BYTE = _columns_of_byte()


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
    if not pattern.is_two_four:
        return pack_bits(mask)
    nibbles = (mask.view(rows, columns // 4, 4) * _NIBBLE_BITS.to(mask.device)).sum(dim=2)
    codes = _CODE_OF_NIBBLE.to(mask.device)[nibbles].view(rows, columns // 8, 2)
    return codes[..., 0] | codes[..., 1] << 4


def pack_bits(mask: Tensor) -> Tensor:
    """Pack any bool mask [O, I] into uint8 [O, I / 8], entry c in bit c % 8 of byte c // 8."""
    rows, columns = mask.shape
    bits = mask.view(rows, columns // 8, 8) * _BYTE_BITS.to(mask.device)
    return bits.sum(dim=2, dtype=torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """Undo `pack_bits`: uint8 [O, I / 8] -> bool [O, I]."""
    bits = packed.unsqueeze(2) & _BYTE_BITS.to(packed.device)
    return bits.ne(0).view(packed.shape[0], packed.shape[1] * 8)


def columns_of(indices: Tensor, pattern: Pattern) -> Tensor:
    """Columns of the kept entries, ascending in each row.

    Args:
        indices: uint8 [O, I / 8] as `pack` made them.
        pattern: the pattern they follow.

    Returns:
        int64 [O, K], usable by `gather` and `scatter` along dimension 1.
    """
    rows, width = indices.shape
    if not pattern.is_two_four:
        return unpack_bits(indices).nonzero()[:, 1].view(rows, pattern.kept(width * 8))
    within = _COLUMNS_OF_BYTE.to(indices.device)[indices.long()]
    first = torch.arange(0, width * 8, 8, device=indices.device).view(1, width, 1)
    return (within + first).view(rows, width * 4)


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
        first = torch.stack([indices & 3, indices >> 4 & 3], dim=2)
        second = torch.stack([indices >> 2 & 3, indices >> 6 & 3], dim=2)
        good = (first < second).flatten(1)
    else:
        groups = unpack_bits(indices).view(indices.shape[0], -1, pattern.m)
        good = groups.sum(dim=2) == pattern.n
    bad_rows = (~good.all(dim=1)).nonzero()
    if len(bad_rows):
        raise ValueError(f"row {int(bad_rows[0])} of the metadata is not a valid {pattern} pattern")


def expand(values: Tensor, indices: Tensor, pattern: Pattern) -> Tensor:
    """Dense matrix with zeros where nothing is kept: values [O, K], indices uint8 [O, I / 8] -> [O, I]."""
    dense = values.new_zeros(indices.shape[0], indices.shape[1] * 8)
    return dense.scatter_(1, columns_of(indices, pattern), values)


def gather(dense: Tensor, indices: Tensor, pattern: Pattern) -> Tensor:
    """Kept entries of a dense matrix, row-major: dense [O, I], indices uint8 [O, I / 8] -> [O, K]."""
    return dense.gather(1, columns_of(indices, pattern))
