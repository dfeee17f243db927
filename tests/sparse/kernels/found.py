"""What a device has to compute 2:4 products with, and the judge of every way: for tests that run on CPUs and GPUs."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slope_dist.sparse import codec, pruning
from slope_dist.sparse.kernels import Dispatcher, Problem, Vendors, find_vendors, measuring, primitives
from slope_dist.sparse.kernels.candidates import Candidate, Operands
from slope_dist.sparse.kernels.choice import Choice
from slope_dist.sparse.kernels.judging import OTHER_BITS
from slope_dist.sparse.kernels.primitives import TWO_FOUR
from slope_dist.sparse.kernels.problem import Kind
from slope_dist.sparse.kernels.vendor import VendorError
from slope_dist.sparse.kernels.vendors import NAMES

VENDORS = ("cuSPARSELt", "CUTLASS")
"""Names of routes, in the order of `NAMES`."""


def device_of(name: str) -> torch.device:
    """A device by its kind, with its index, which tensors on it have too."""
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")


@cache
def found_on(name: str) -> Vendors:
    """The vendor libraries of a GPU; on the CPU the stand-in for cuSPARSELt."""
    if name == "cuda":
        return find_vendors(device_of(name))
    from slope_dist.sparse.kernels.cusparselt import CusparseltRoute
    from tests.sparse.kernels.cusparselt.conftest import build_standin

    path = build_standin(Path(tempfile.mkdtemp(prefix="standin-")))
    return Vendors((CusparseltRoute(device_of(name), path),), {"cutlass": "it has no stand-in on a CPU"})


def leave_out_interpreter(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """On a CPU plain torch in place of Triton, whose interpreter is slow and makes garbage of products of bf16."""
    if device == "cpu":
        monkeypatch.setattr(primitives, "why_no_triton", lambda device_type: "left out of this test")


def need(device: str, wanted: str) -> Vendors:
    """The libraries of a device; the test is skipped where the one whose name begins `wanted` is not among them."""
    vendors = found_on(device)
    for vendor, key in zip(VENDORS, NAMES, strict=True):
        if vendor in wanted and key in vendors.missing:
            pytest.skip(f"without {vendor}: {vendors.missing[key]}")
    return vendors


def in_order(calls: Mapping[str, Callable[[], object]], *_: object) -> dict[str, float]:
    """A timer that runs nothing: every way takes longer than the one before."""
    return {label: 1.0 + number for number, label in enumerate(calls)}


def operands_of(
    kind: Kind, problem: Problem, *, bias: bool = False, addend: bool = False, held: bool = False
) -> tuple[Operands, Tensor]:
    """Operands of a problem, and its result in fp64 of the same rounded numbers, by plain torch."""
    dtype, device = problem.dtype, problem.device
    values, indices = primitives.random_matrix(problem.rows, problem.columns, dtype, device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device, dtype)

    if kind == "product":
        x = normal(problem.tokens, problem.columns)
        given = Operands(
            x,
            values,
            indices,
            bias=normal(problem.rows) if bias else None,
            addend=normal(problem.tokens, problem.rows) if addend else None,
        )
        expected = x.double() @ codec.expand(values, indices, TWO_FOUR).double().t()
        expected = expected if given.bias is None else expected + given.bias.double()
        return given, expected if given.addend is None else expected + given.addend.double()
    kept = pruning.column_mask(normal(*values.shape), indices, TWO_FOUR) if held else None
    grad_y = normal(problem.tokens, problem.rows)
    mask = None if kept is None else codec.pack_bits(kept)
    expected = grad_y.double() @ pruning.doubly_pruned(values, indices, TWO_FOUR, kept).double()
    return Operands(grad_y, values, indices, column_mask=mask), expected


def wrong_ones(
    dispatcher: Dispatcher, ways: Iterable[Candidate], operands: Operands, expected: Tensor
) -> dict[str, str]:
    """Which ways do not give what is expected, by name, and what they do instead."""
    found = {way.label: _why_wrong(dispatcher, way, operands, expected) for way in ways}
    return {label: reason for label, reason in found.items() if reason is not None}


def _why_wrong(dispatcher: Dispatcher, way: Candidate, operands: Operands, expected: Tensor) -> str | None:
    before = None if operands.addend is None else operands.addend.clone()
    try:
        given = dispatcher.given(way, operands)
        y = way.run(given)
        again = way.run(given) if way.deterministic else y
    except VendorError as error:
        return str(error)
    if y.shape != expected.shape or y.dtype != operands.x.dtype or not y.is_contiguous():
        return f"gives {y.dtype} {tuple(y.shape)}, strides {y.stride()}"
    if operands.addend is not None and not operands.addend.equal(before):
        return "overwrites the addend"
    # By bits: NaN is not equal to itself.
    if not codec.as_integers(y).equal(codec.as_integers(again)):
        return OTHER_BITS
    return measuring.why_wrong(y, expected, operands.x.shape[1])


def tell_rejected(vendors: Vendors, kind: Kind, problem: Problem, choice: Choice) -> None:
    """Have pytest's summary of warnings name a library's ways that are wrong or refuse; one of ours must not be."""
    ours = {label: reason for label, reason in choice.rejected.items() if not any(v in label for v in vendors.versions)}
    assert not ours, f"{kind} {problem}: {ours}"
    if choice.rejected:
        listed = "; ".join(f"{label}: {reason}" for label, reason in choice.rejected.items())
        warnings.warn(f"{kind} {problem}, {vendors.versions}, rejected: {listed}", stacklevel=2)
