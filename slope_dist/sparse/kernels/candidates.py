"""The ways to compute one product, each with a name that stays the same between runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from slope_dist.sparse.kernels import primitives
from slope_dist.sparse.kernels.problem import Problem
from slope_dist.sparse.kernels.vendor import VendorError, VendorRoute
from slope_dist.sparse.kernels.vendors import Vendors

Route = Literal["expand", "sparse", "tiled", "decode"]

MOST_DECODED_TOKENS = 32
TILED_RATIO = 2
"""Weights at least this many times as high as wide may be cut into square tiles (arXiv 2405.16325 section 4.4)."""


@dataclass(frozen=True)
class Operands:
    """What a product is made of; sizes as in `Problem`.

    Attributes:
        x: [T, I].
        values, indices: the weight, [O, K] and uint8 [O, I / 8].
        form, metadata: a vendor's metadata of this weight, if there is one: see `Candidate.form`.
        bias: [O] or None.
        addend: [T, O] or None.
        column_mask: of an input gradient: packed uint8 [O, I / 8], or None for the magnitudes of now.
    """

    x: Tensor
    values: Tensor
    indices: Tensor
    form: str = ""
    metadata: Tensor | None = None
    bias: Tensor | None = None
    addend: Tensor | None = None
    column_mask: Tensor | None = None


@dataclass(frozen=True)
class Candidate:
    """One way to compute a product, Y = X W^T + bias + addend or the input gradient dX = dY W^{R,C} (x is dY then).

    Attributes:
        label: its name.
        route: what it does.
        deterministic: whether the same operands always give the same bits.
        run: computes it.
        form: the vendor's metadata that it reads, "" where it reads ours: derived on the spot if it is not given.
        vendor, algorithm: of the library, "" where none is used.
    """

    label: str
    route: Route
    deterministic: bool
    run: Callable[[Operands], Tensor]
    form: str = ""
    vendor: str = ""
    algorithm: str = ""


def expanded(operands: Operands) -> Tensor:
    """Expand W^R, then one dense product."""
    dense = primitives.expand(operands.values, operands.indices)
    if operands.addend is None:
        return functional.linear(operands.x, dense, operands.bias)
    y = torch.addmm(operands.addend, operands.x, dense.t())
    return y if operands.bias is None else y.add_(operands.bias)


def _decoded(operands: Operands) -> Tensor:
    from slope_dist.sparse.kernels.jit.decode import decode

    y = decode(operands.x, operands.values, operands.indices, bias=operands.bias)
    return y if operands.addend is None else y.add_(operands.addend)


EXPAND = Candidate("expand", "expand", True, expanded)


def candidates(problem: Problem, vendors: Vendors, *, decode: bool) -> Iterator[Candidate]:
    """Every way to compute a problem on its device; the first is `expand`, which always works."""
    yield EXPAND
    if decode and problem.tokens <= MOST_DECODED_TOKENS:
        yield Candidate("decode", "decode", True, _decoded)
    for vendor, tiles, algorithms in _algorithms(problem, vendors):
        if not isinstance(algorithms, str):
            yield from _of_vendor(vendor, algorithms, tiles)


def refusals(problem: Problem, vendors: Vendors) -> dict[str, str]:
    """Why libraries have no way to compute a problem, by the form that they would want."""
    asked = _algorithms(problem, vendors)
    return {_form(vendor, tiles): reason for vendor, tiles, reason in asked if isinstance(reason, str)}


def _algorithms(problem: Problem, vendors: Vendors) -> Iterator[tuple[VendorRoute, int, Sequence[Any] | str]]:
    """Each library, the row tiles that it may be given, and its algorithms for one, or why there are none."""
    for vendor in vendors.routes:
        for tiles in tile_counts(problem.rows, problem.columns):
            tile = Problem(problem.tokens, problem.rows // tiles, problem.columns, problem.dtype, problem.device)
            found: Sequence[Any] | str | None = vendor.unsupported(tile)
            if found is None:
                try:
                    found = vendor.algorithms(tile) or f"{vendor.name} names no algorithm for {tile}"
                except VendorError as error:
                    found = str(error)
            yield vendor, tiles, found


def input_gradient_candidates(problem: Problem, over_transpose: Candidate, vendors: Vendors) -> Iterator[Candidate]:
    """Every way to compute the input gradient of a problem from W^R alone; `expand` first.

    Args:
        problem: T, and O and I of W.
        over_transpose: how the product over (W^{R,C})^T is computed once that has been made.
        vendors: with the one that it uses.
    """
    yield EXPAND_DOUBLY_PRUNED
    if over_transpose.route in ("sparse", "tiled"):
        vendor = next(route for route in vendors.routes if route.name == over_transpose.vendor)
        yield replace(
            over_transpose,
            label=f"transpose, {over_transpose.label}",
            run=partial(_over_transpose, over_transpose, vendor),
            form="",
        )


def _expanded_doubly_pruned(operands: Operands) -> Tensor:
    return operands.x @ primitives.doubly_pruned(operands.values, operands.indices, operands.column_mask)


def _over_transpose(product: Candidate, vendor: VendorRoute, operands: Operands) -> Tensor:
    weight = operands.values, operands.indices, operands.column_mask
    if product.route == "tiled":
        return product.run(Operands(operands.x, *primitives.transpose(*weight)))
    values, indices, metadata = transpose_for(vendor, *weight)
    return product.run(Operands(operands.x, values, indices, product.form, metadata))


def transpose_for(
    vendor: VendorRoute, values: Tensor, indices: Tensor, column_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(W^{R,C})^T, its values made where the vendor reads them, before its metadata.

    Returns:
        values [I, O / 2], indices uint8 [I, O / 8], metadata uint8 [I O / 8] or None if it is kept in no known way.
    """
    rows, width = indices.shape
    head = values.nbytes
    buffer = values.new_empty(head + indices.nbytes, dtype=torch.uint8)
    into = buffer[:head].view(values.dtype).view(8 * width, rows // 2)
    transposed, packed = primitives.transpose(values, indices, column_mask, into)
    try:
        metadata = metadata_of(vendor, 1, packed, values.dtype)
    except VendorError:
        return transposed, packed, None
    return transposed, packed, buffer[head:].copy_(metadata)


EXPAND_DOUBLY_PRUNED = Candidate("expand", "expand", True, _expanded_doubly_pruned)


def tile_counts(rows: int, columns: int) -> list[int]:
    """Into how many tiles of as many rows as columns a weight may be cut; 1 first."""
    whole = rows >= TILED_RATIO * columns and rows % columns == 0
    return [1, rows // columns] if whole else [1]


def _form(vendor: VendorRoute, tiles: int) -> str:
    return f"{vendor.name}/{tiles}"


def _of_vendor(vendor: VendorRoute, algorithms: Sequence[Any], tiles: int) -> Iterator[Candidate]:
    form = _form(vendor, tiles)
    for algorithm in algorithms:

        def run(operands: Operands, algorithm: object = algorithm) -> Tensor:
            metadata = operands.metadata if operands.form == form else None
            if tiles == 1:
                return vendor.product(
                    operands.x,
                    operands.values,
                    operands.indices,
                    metadata,
                    algorithm,
                    bias=operands.bias,
                    addend=operands.addend,
                )
            return _tiled(vendor, algorithm, tiles, metadata, operands)

        yield Candidate(
            f"{form} {algorithm}",
            "sparse" if tiles == 1 else "tiled",
            algorithm.deterministic,
            run,
            form,
            vendor.name,
            str(algorithm),
        )


def _tiled(vendor: VendorRoute, algorithm: object, tiles: int, metadata: Tensor | None, operands: Operands) -> Tensor:
    """Products over equal row tiles of the weight, side by side."""
    outputs = []
    for i, (values, indices) in enumerate(
        zip(operands.values.chunk(tiles), operands.indices.chunk(tiles), strict=True)
    ):
        part = None if metadata is None else metadata.chunk(tiles)[i]
        bias = None if operands.bias is None else operands.bias.chunk(tiles)[i]
        outputs.append(vendor.product(operands.x, values, indices, part, algorithm, bias=bias))
    y = torch.cat(outputs, dim=1)
    return y if operands.addend is None else y.add_(operands.addend)


def metadata_of(vendor: VendorRoute, tiles: int, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """A vendor's metadata of a weight cut into row tiles, tile after tile: uint8 [O, I / 8] -> uint8 [O * I / 8].

    Raises:
        VendorError: if the vendor keeps it in no way that is known.
    """
    rows, width = indices.shape
    layout = vendor.metadata_layout(rows // tiles, width * 8, dtype)
    if layout is None:
        raise VendorError(f"{vendor.name} keeps metadata in an unknown way")
    parts = [layout.vendor(part.contiguous()) for part in indices.chunk(tiles)]
    return parts[0] if tiles == 1 else torch.cat(parts)
