"""Device functions on groups of four entries, for the kernels of this package; everything stays in registers.

A group is two entries and a code: the two ascending 2-bit positions of its kept entries, the first in the low bits.
Entries are numbered 0..3 in a group, and codes are taken as valid (`codec.check`).
"""

# Device functions are in Triton's language: sequences are summed, not starred.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def first_of(block: tl.constexpr):
    """First of the `block` things that this program does, in 64 bits: a matrix may have more than 2^31 entries."""
    return tl.program_id(0).to(tl.int64) * block


@triton.jit
def left_of(start, size, block: tl.constexpr):
    """How many of the `block` things from `start` lie below `size`."""
    return tl.maximum(tl.minimum(size - start, block), 0).to(tl.int32)


@triton.jit
def split4(entries):
    """[..., 4 n] -> four tensors [..., n]: the zeroth to third of every four."""
    groups: tl.constexpr = entries.shape[:-1] + [entries.shape[-1] // 4, 2, 2]
    even, odd = entries.reshape(groups).split()
    zeroth, second = even.split()
    first, third = odd.split()
    return zeroth, first, second, third


@triton.jit
def join4(a, b, c, d):
    """Four tensors of one shape -> [..., 4]."""
    shape: tl.constexpr = a.shape + [4]
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(shape)


@triton.jit
def nibbles_of(packed):
    """Bytes [..., n] -> their nibbles [..., 2 n], the low one first: the codes, or held bits, of consecutive groups."""
    shape: tl.constexpr = packed.shape[:-1] + [2 * packed.shape[-1]]
    return tl.join(packed & 15, packed >> 4).reshape(shape).to(tl.int32)


@triton.jit
def entry_of(first, second, code, position: tl.constexpr):
    """What stands at a position of a group: its first or second entry, or 0 where neither does."""
    # By masks of all bits: selects would need more predicates at a time than there are.
    is_first = ((1 << (code & 3)) << (31 - position)) >> 31
    is_second = ((1 << (code >> 2 & 3)) << (31 - position)) >> 31
    if position == 0:
        return first & is_first
    elif position == 3:
        return second & is_second
    else:
        return (first & is_first) | (second & is_second)


@triton.jit
def score_of(entries, largest: tl.constexpr):
    """Numbers from 1 up that order entries by magnitude, as `pruning.scores`: NaN is largest, 0 is what was pruned.

    `largest` is the greatest integer of the entries' own width.
    """
    return tl.minimum(entries & largest, largest - 1) + 1


@triton.jit
def two_best(a, b, c, d):
    """Which two of four scores are the largest, ties to the first, as (lower, upper, a_leads, c_leads).

    `lower`: they are a and b; `upper`: they are c and d; else they are one of each pair, the one that leads.
    """
    lower = tl.minimum(a, b) >= tl.maximum(c, d)
    upper = tl.minimum(c, d) > tl.maximum(a, b)
    return lower, upper, a >= b, c >= d
