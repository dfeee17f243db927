"""Whether a candidate gives what the reference gives: on which operands, before it is timed, and before it is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from slope_dist.sparse import codec, pruning
from slope_dist.sparse.kernels import measuring, primitives
from slope_dist.sparse.kernels.candidates import Candidate, Operands
from slope_dist.sparse.kernels.problem import Kind, Problem

OTHER_BITS = "gives other bits another time, though it is called deterministic"

REPEATS = 4
"""Of a library's product, to see whether its bits are always the same: the second time need not show it, for algorithms
are known that are wrong now and then (pytorch issue 155333)."""

Look: TypeAlias = Callable[[Kind, Candidate, Operands, Tensor], str | None]
"""What is wrong with a candidate's result, given its operands and what is expected; None: nothing."""


def sample(kind: Kind, problem: Problem) -> tuple[Operands, Callable[[Tensor], Tensor], Tensor]:
    """Operands of a problem, the dense product that it is measured beside, and its right result in fp32."""
    device, dtype = problem.device, problem.dtype
    values, indices = primitives.random_matrix(problem.rows, problem.columns, dtype, device)
    inner = problem.columns if kind == "product" else problem.rows
    # Of a generator of its own: a run's random stream must not depend on what is measured.
    generator = torch.Generator(device).manual_seed(problem.tokens)
    x = torch.randn(problem.tokens, inner, device=device, generator=generator).to(dtype)
    # By plain torch, which is what defines the products.
    if kind == "product":
        matrix = codec.expand(values, indices, primitives.TWO_FOUR)
    else:
        matrix = pruning.doubly_pruned(values, indices, primitives.TWO_FOUR).t().contiguous()
    expected = x.float() @ matrix.float().t()
    # A dense weight has no zeros; products of zeros take less power, and less time on a card that is at its limit.
    matrix.normal_(generator=generator)
    return Operands(x, values, indices), lambda x: functional.linear(x, matrix), expected


def why_wrong(kind: Kind, candidate: Candidate, operands: Operands, expected: Tensor) -> str | None:
    """What is wrong with a candidate's result, also where it is to add a bias and an addend; None: nothing."""
    y = candidate.run(operands)
    wrong = measuring.why_wrong(y, expected, operands.x.shape[1])
    if wrong is not None:
        return wrong
    # By bits: NaN is not equal to itself.
    if candidate.deterministic and not _same_bits(candidate.run(operands), y):
        return OTHER_BITS
    if kind == "input gradient":
        return None
    bias, addend = _added(expected, operands.x.dtype)
    return _off(candidate, operands, expected, "bias and addend", bias, addend)


def why_wrong_in_use(kind: Kind, candidate: Candidate, operands: Operands, expected: Tensor) -> str | None:
    """The same of a library's product that is about to be chosen: looked at longer, and in each of its uses.

    To a library a bias alone and an addend alone are products of their own.
    """
    if not candidate.vendor:
        return None
    if candidate.deterministic:
        y = candidate.run(operands)
        if not all(_same_bits(candidate.run(operands), y) for _ in range(REPEATS)):
            return OTHER_BITS
    if kind == "input gradient":
        return None
    bias, addend = _added(expected, operands.x.dtype)
    return _off(candidate, operands, expected, "bias", bias, None) or _off(
        candidate, operands, expected, "addend", None, addend
    )


def _added(expected: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A bias and an addend of the product's own size, or leaving them out would pass."""
    return expected[0].to(dtype), expected.flip(0).to(dtype)


def _off(
    candidate: Candidate, operands: Operands, expected: Tensor, name: str, bias: Tensor | None, addend: Tensor | None
) -> str | None:
    y = candidate.run(replace(operands, bias=bias, addend=addend))
    wrong = measuring.why_wrong(y, expected, operands.x.shape[1], bias=bias, addend=addend)
    return None if wrong is None else f"with {name} {wrong}"


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return codec.as_integers(one).equal(codec.as_integers(other))
