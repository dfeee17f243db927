"""How a cuSPARSELt orders its compressed operand: learned from its compressor, since it is documented nowhere.

What torch, xformers and the paper's code rely on is that the operand is [values row-major | metadata]. Here that is
asked of the library that is loaded, for the shape that is meant, before anything relies on it.

Metadata never comes from weights: a kept weight may be 0, and a compressor then keeps another position (rule R2). So
ones stand at the kept positions. Each pass gives every group one of the six possible codes, a digit of the group's
number in base six; after ceil(log6(groups)) passes each nibble of the metadata has told which group it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slope_dist.sparse import codec
from slope_dist.sparse.kernels.metadata import MetadataLayout
from slope_dist.sparse.pattern import Pattern

TWO_FOUR = Pattern(2, 4)

CODES = torch.tensor([first | second << 2 for second in range(4) for first in range(second)], dtype=torch.uint8)
"""The six codes of a group."""

LARGEST_INTEGER = 251
"""Whole numbers up to it are exact in bfloat16, whose 8 bits of significand end at 256; a prime, so that no number of
columns is a multiple of it."""

CHECKS = 2


class UnknownLayoutError(Exception):
    """The operand is not [values row-major | a permutation of our metadata]; the text says what was found instead."""


def learn_layout(
    compress: Callable[[Tensor], Tensor], rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> MetadataLayout:
    """Find out where the metadata of [O, I] keeps each group's code, and that the values are the operand's head.

    Args:
        compress: a dense [O, I] to the library's operand, uint8 [bytes].
        rows: O.
        columns: I.
        dtype: of the weight, 16 bits.
        device: of the weight.

    Raises:
        UnknownLayoutError: if it is otherwise; then only what the library has compressed can be given to it.
    """
    groups = rows * columns // 4
    head = rows * columns
    _check_values_first(compress, rows, columns, dtype, device)
    codes = CODES.to(device)
    digit_of_code = torch.full((16,), -1, dtype=torch.int32, device=device)
    digit_of_code[codes.int()] = torch.arange(6, dtype=torch.int32, device=device)
    ones = torch.ones(rows, columns // 2, dtype=dtype, device=device)
    number = torch.arange(groups, dtype=torch.int32, device=device)
    source = torch.zeros(groups, dtype=torch.int32, device=device)
    weight = 1
    while weight < groups:
        indices = _packed(codes[number // weight % 6], rows)
        operand = compress(codec.expand(ones, indices, TWO_FOUR))
        if operand.numel() != head + groups // 2:
            raise UnknownLayoutError(f"the operand takes {operand.numel()} bytes instead of {head + groups // 2}")
        metadata = operand[head:]
        digits = digit_of_code[torch.stack([metadata & 15, metadata >> 4], dim=1).view(-1).int()]
        if bool((digits < 0).any()):
            raise UnknownLayoutError("the metadata holds other codes than two ascending positions a group")
        source += digits * weight
        weight *= 6
    if not _is_permutation(source):
        raise UnknownLayoutError("the metadata is no permutation of one code a group")
    layout = MetadataLayout.of(source, rows)
    for check in range(CHECKS):
        generator = torch.Generator(device).manual_seed(check)
        indices = _packed(codes[torch.randint(6, (groups,), device=device, generator=generator)], rows)
        drawn = torch.randn(rows, columns // 2, device=device, generator=generator).to(dtype)
        # No zeros: of those the compressor would choose the positions.
        values = torch.where(drawn == 0, 1, drawn)
        expected = torch.cat([values.view(torch.uint8).view(-1), layout.vendor(indices)])
        if not compress(codec.expand(values, indices, TWO_FOUR)).equal(expected):
            raise UnknownLayoutError("an operand of our own making is not the compressor's")
    return layout


def _check_values_first(
    compress: Callable[[Tensor], Tensor], rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> None:
    """See that the operand's head is the kept entries, row-major, by numbering them in several passes."""
    indices = _packed(CODES.to(device).repeat(rows * columns // 24 + 1)[: rows * columns // 4], rows)
    number = torch.arange(rows * columns // 2, dtype=torch.int32, device=device).view(rows, -1)
    weight = 1
    while weight < number.numel():
        values = (number // weight % LARGEST_INTEGER + 1).to(dtype)
        operand = compress(codec.expand(values, indices, TWO_FOUR))
        if not operand[: rows * columns].equal(values.view(torch.uint8).view(-1)):
            raise UnknownLayoutError("the operand does not begin with the kept entries, row by row")
        weight *= LARGEST_INTEGER


def _is_permutation(source: Tensor) -> bool:
    """Whether int32 [N] holds each of 0 ... N - 1; without a sort, whose indices alone would take twice its memory."""
    if bool(((source < 0) | (source >= source.numel())).any()):
        return False
    seen = torch.zeros_like(source, dtype=torch.bool)
    seen[source] = True
    return bool(seen.all())


def _packed(codes: Tensor, rows: int) -> Tensor:
    """Codes of groups, uint8 [O I / 4], as `indices` [O, I / 8]."""
    pairs = codes.view(-1, 2)
    return (pairs[:, 0] | pairs[:, 1] << 4).view(rows, -1)
