"""Device functions on groups of four entries, for the kernels of this package; everything stays in registers.

A group is two entries and a code: the two ascending 2-bit positions of its kept entries, the first in the low bits.
Entries are numbered 0..3 in a group, and codes are taken as valid (`codec.check`).
"""

from __future__ import annotations

import triton
import triton.language as tl

PRUNED = tl.constexpr(-1)
"""Score of what is not kept: below that of a kept zero."""


@triton.jit
def first_of(block: tl.constexpr):
    """First of the `block` things that this program does, in 64 bits: a matrix may have more than 2^31 entries."""
    return tl.program_id(0).to(tl.int64) * block


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
    return tl.join(packed & 15, packed >> 4).reshape(shape)


@triton.jit
def entry_of(first, second, code, position: tl.constexpr, otherwise):
    """What stands at a position of a group: its first or second entry, or `otherwise` where neither does."""
    if position == 0:
        return tl.where((code & 3) == 0, first, otherwise)
    elif position == 3:
        return tl.where((code >> 2 & 3) == 3, second, otherwise)
    else:
        return tl.where((code & 3) == position, first, tl.where((code >> 2 & 3) == position, second, otherwise))


@triton.jit
def score_of(entries, largest: tl.constexpr):
    """Numbers from 0 up that order entries by magnitude, as `pruning._scores` does less one: NaN is largest.

    `largest` is the greatest integer of the entries' own width.
    """
    return tl.minimum(entries & largest, largest - 1)


@triton.jit
def two_best(a, b, c, d):
    """Which two of four scores are largest, ties to the first: four masks, of which two are set at each place."""
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
    # Best two of four: it beats two or all of the other three.
    best_a = (ab & ac) | (ad & (ab | ac))
    best_b = (bc & bd) | (~ab & (bc | bd))
    best_c = (~ac & ~bc) | (cd & (~ac | ~bc))
    best_d = (~ad & ~bd) | (~cd & (~ad | ~bd))
    return best_a, best_b, best_c, best_d
