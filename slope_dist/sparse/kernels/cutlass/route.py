"""2:4 products by CUTLASS, as a route of the dispatcher. Values and metadata are read where they lie."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from slope_dist.sparse.kernels.cutlass import build, layout, toolchain
from slope_dist.sparse.kernels.cutlass.library import Library
from slope_dist.sparse.kernels.cutlass.tiles import ARCHITECTURES, ELEMENTS, TILES, Tile
from slope_dist.sparse.kernels.cutlass.toolchain import Toolchain
from slope_dist.sparse.kernels.problem import Problem
from slope_dist.sparse.kernels.vendor import VendorError, on, stream_of

ALIGNMENT = 16
"""Bytes on whose multiples every operand begins; one that does not is copied."""

MOST_ELEMENTS = 2**31 - 1
"""Of a matrix. Beyond, 32-bit places of the kernels' own would not do."""

MULTIPLES = {"sm_80": (32, 64), "sm_90a": (64, 64)}
"""Of O and of I, by architecture.

Ampere's metadata is ordered by 32 rows; beyond a whole tile's 64 columns the main loop reads zeros, which are no codes.
Hopper's is ordered by 64 x 64. T is free: it is a contiguous dimension of nothing.
"""

LAYOUTS = {"sm_80": layout.sm80, "sm_90a": layout.sm90}


class CutlassRoute:
    """CUTLASS on one device.

    Args:
        device: a CUDA device.

    Raises:
        VendorError: if the device is none it is compiled for, or compiler or headers are missing.
    """

    name = "CUTLASS"
    standing = "compiled, not yet run on a card"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.findings: dict[str, bool | None] = {}
        self.architecture = _architecture(device)
        self._tools = toolchain.find()
        self.version = f"{self._tools.cutlass_version}, nvcc {self._tools.nvcc_version}"
        self._libraries: dict[torch.dtype, dict[Tile, Library] | str] = {}
        self._lock = threading.Lock()
        self._processors = 0
        if device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            self._processors = torch.cuda.get_device_properties(self.device).multi_processor_count

    def unsupported(self, problem: Problem) -> str | None:
        """Why a problem cannot be computed, in words, or None. The first of an element type compiles its kernels."""
        if problem.dtype not in ELEMENTS:
            return f"CUTLASS is used for float16 and bfloat16, not for {str(problem.dtype).removeprefix('torch.')}"
        rows, columns = MULTIPLES[self.architecture]
        if problem.rows % rows or problem.columns % columns:
            return (
                f"CUTLASS on {self.architecture} takes weights of a multiple of {rows} rows and {columns} columns, "
                f"not {problem.rows} x {problem.columns}"
            )
        sides = (problem.rows, problem.columns)
        largest = max(problem.rows * problem.columns, *(problem.tokens * side for side in sides))
        if largest > MOST_ELEMENTS:
            return f"CUTLASS is used for matrices of up to {MOST_ELEMENTS} elements, not {largest}"
        libraries = self._compiled(problem.dtype)
        return libraries if isinstance(libraries, str) else None

    def metadata_layout(self, rows: int, columns: int, dtype: torch.dtype) -> layout.WordLayout:
        """How the metadata of weights [rows, columns] is ordered, of either element type."""
        return LAYOUTS[self.architecture](rows, columns)

    def algorithms(self, problem: Problem) -> list[Tile]:
        """The tiles that a supported problem may be cut into: all there are."""
        return list(TILES[self.architecture])

    def product(
        self,
        x: Tensor,
        values: Tensor,
        indices: Tensor,
        metadata: Tensor | None,
        algorithm: Tile,
        *,
        bias: Tensor | None = None,
        addend: Tensor | None = None,
    ) -> Tensor:
        """See `VendorRoute.product`; every operand is read where it lies."""
        (tokens, columns), rows = x.shape, values.shape[0]
        assert values.shape[1] * 2 == columns and x.dtype == values.dtype, "the kernel would read beyond the operands"
        assert bias is None or (bias.shape == (rows,) and bias.dtype == x.dtype)
        assert addend is None or (addend.shape == (tokens, rows) and addend.dtype == x.dtype)
        y = x.new_empty(tokens, rows)
        if not tokens:
            return y
        if metadata is None:
            metadata = self.metadata_layout(rows, columns, x.dtype).vendor(indices)
        assert metadata.numel() == rows * columns // 8
        libraries = self._compiled(x.dtype)
        if isinstance(libraries, str):
            raise VendorError(libraries)
        library = libraries[algorithm]
        # Held until the product is queued: what is freed before may be given to another thread.
        held = [None if part is None else _aligned(part) for part in (values, metadata, x, bias, addend)]
        pointers = [None if part is None else part.data_ptr() for part in held]
        with on(self.device):
            code = library.product(
                rows,
                columns,
                tokens,
                *pointers,
                y.data_ptr(),
                self.device.index or 0,
                self._processors,
                stream_of(self.device),
            )
        if code:
            shape = f"{rows} x {columns}, {tokens} tokens"
            raise VendorError(f"CUTLASS {algorithm} refuses {shape}: {library.reason(code)}")
        return y

    def _compiled(self, dtype: torch.dtype) -> dict[Tile, Library] | str:
        """The kernels of an element type, compiled now if they are not, or why they cannot be."""
        found = self._libraries.get(dtype)
        if found is None:
            with self._lock:
                if dtype not in self._libraries:
                    self._libraries[dtype] = self._compile(dtype)
                found = self._libraries[dtype]
        return found

    def _compile(self, dtype: torch.dtype) -> dict[Tile, Library] | str:
        tiles = TILES[self.architecture]
        try:
            with ThreadPoolExecutor(min(len(tiles), os.cpu_count() or 1)) as pool:
                libraries = pool.map(lambda tile: open_library(self._tools, tile, dtype), tiles)
                return dict(zip(tiles, libraries, strict=True))
        except VendorError as error:
            return str(error)


def open_library(tools: Toolchain, tile: Tile, dtype: torch.dtype) -> Library:
    """The library of a tile and element type, from the cache folder, compiled now if it is not there."""
    return Library(build.build(tools, tile, dtype, build.cache_folder()))


def _architecture(device: torch.device) -> str:
    """What to compile for.

    Raises:
        VendorError: if it is nothing that there are kernels for.
    """
    capability = torch.cuda.get_device_capability(device)
    if capability not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES.values())
        raise VendorError(f"there are CUTLASS kernels for {known}, not for sm_{capability[0]}{capability[1]}")
    return ARCHITECTURES[capability]


def _aligned(operand: Tensor) -> Tensor:
    """An operand as kernels take it: where it lies, if its rows follow each other from a multiple of 16 bytes on."""
    operand = operand.detach()
    if operand.is_contiguous() and not operand.data_ptr() % ALIGNMENT:
        return operand
    return operand.clone(memory_format=torch.contiguous_format)
