"""2:4 products by cuSPARSELt, as a route of the dispatcher.

The operand is one buffer, [values | metadata]. Where the caller's values and metadata lie so, they are used where they
lie; otherwise both are copied into scratch, at 9 bytes written for 8 of weight ("staged": DeepSpeed keeps parameters in
flat buffers of its own). Where the order of the operand cannot be learned (`probe`), the dense matrix is made and
compressed for every product: right whatever the order, since a kept zero that the compressor places elsewhere adds
nothing there either, and slow enough for the dispatcher to prefer something else.

Scratch comes from torch's allocator anew for each product: it is shared between the products of a stream and never
between streams, also inside CUDA graphs, because that is what the allocator does.
"""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import torch
from torch import Tensor

from slope_dist.sparse.kernels import primitives
from slope_dist.sparse.kernels.cusparselt import segment_k
from slope_dist.sparse.kernels.cusparselt.library import DATA_TYPES, Handle, Library
from slope_dist.sparse.kernels.cusparselt.plan import (
    ALIGNMENT,
    SEGMENT_K,
    Algorithm,
    Compressor,
    Description,
    PlanCache,
)
from slope_dist.sparse.kernels.cusparselt.probe import UnknownLayoutError, learn_layout
from slope_dist.sparse.kernels.metadata import MetadataLayout
from slope_dist.sparse.kernels.problem import Problem
from slope_dist.sparse.kernels.vendor import NO_MEMORY, VendorError, on, stream_of

STANDING = "not yet proven on a card"

WEIGHT_MULTIPLE = 16
"""Of O and I: what the library asks of a 16-bit structured matrix."""

TOKEN_MULTIPLE = 8
"""Of T: what the library asks of a 16-bit dense matrix. Other numbers of tokens are padded here."""

MOST_ELEMENTS = 2**31 - 1
"""Of a 16-bit matrix, the library's own limit."""

HOPPER = 9

PLANS = 4096
"""A plan for each product with a bias of its own; of 600 such layers with two shapes of batches 1,200."""


class CusparseltRoute:
    """cuSPARSELt on one device.

    Args:
        device: a CUDA device.
        path: of the library; otherwise the installed one.
        plans: how many are kept.

    Raises:
        VendorError: if there is no library, or it does not run on the device.
    """

    name = "cuSPARSELt"
    standing = STANDING

    def __init__(self, device: torch.device, path: Path | None = None, plans: int = PLANS) -> None:
        library = Library(path)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.findings: dict[str, bool | None] = {}
        self.version = library.version
        self._handle = Handle(library, device)
        self._plans = PlanCache(self._handle, plans)
        self._layouts: dict[tuple[int, int, torch.dtype], MetadataLayout | str] = {}
        self._layouts_lock = threading.Lock()
        self._compressors: dict[tuple[int, int, torch.dtype], Compressor] = {}
        self._streams: dict[int, ctypes.Array] = {}

    def unsupported(self, problem: Problem) -> str | None:
        """Why the library cannot compute a product, in words, or None if it can."""
        if problem.dtype not in DATA_TYPES:
            return f"cuSPARSELt is used for float16 and bfloat16, not for {str(problem.dtype).removeprefix('torch.')}"
        if problem.rows % WEIGHT_MULTIPLE or problem.columns % WEIGHT_MULTIPLE:
            return (
                f"cuSPARSELt takes weights whose sides are multiples of {WEIGHT_MULTIPLE}, "
                f"not {problem.rows} x {problem.columns}"
            )
        tokens = problem.tokens + -problem.tokens % TOKEN_MULTIPLE
        largest = max(problem.rows * problem.columns, tokens * problem.columns, tokens * problem.rows)
        if largest > MOST_ELEMENTS:
            return f"cuSPARSELt takes matrices of up to {MOST_ELEMENTS} elements, not {largest}"
        try:
            self._layout(problem.rows, problem.columns, problem.dtype)
        except VendorError as error:
            return str(error)
        return None

    def metadata_layout(self, rows: int, columns: int, dtype: torch.dtype) -> MetadataLayout | None:
        """How the library orders the metadata of weights [rows, columns]; learned once for each shape.

        None where it cannot be learned: each product then compresses anew, from values and `indices`.

        Raises:
            VendorError: if the library cannot compress the shape.
        """
        layout = self._layout(rows, columns, dtype)
        return layout if isinstance(layout, MetadataLayout) else None

    def why_recompressed(self, rows: int, columns: int, dtype: torch.dtype) -> str | None:
        """Why products over weights [rows, columns] compress each time, or None if they need not."""
        layout = self._layout(rows, columns, dtype)
        return layout if isinstance(layout, str) else None

    def algorithms(self, problem: Problem) -> list[Algorithm]:
        """Every algorithm of the library for a supported product; segment-k on Hopper alone, once seen to come back.

        Raises:
            VendorError: if the library refuses the shape.
        """
        tokens = problem.tokens + -problem.tokens % TOKEN_MULTIPLE
        description = Description(self._handle, tokens, problem.rows, problem.columns, problem.dtype, bias=0)
        configs = description.configs()
        found = [Algorithm(config) for config in configs]
        if _generation(self.device) == HOPPER and self._takes_segment_k():
            found += [Algorithm(config, SEGMENT_K) for config in configs]
        return found

    def product(
        self,
        x: Tensor,
        values: Tensor,
        indices: Tensor,
        metadata: Tensor | None,
        algorithm: Algorithm,
        *,
        bias: Tensor | None = None,
        addend: Tensor | None = None,
    ) -> Tensor:
        """See `VendorRoute.product`; metadata that begins where the values end makes the operand in place."""
        tokens, columns = x.shape
        rows = values.shape[0]
        assert values.shape[1] * 2 == columns and x.dtype == values.dtype, "the library would read beyond the operands"
        assert addend is None or (addend.shape == (tokens, rows) and addend.dtype == x.dtype)
        assert bias is None or (bias.shape == (rows,) and bias.dtype == x.dtype)
        padding = -tokens % TOKEN_MULTIPLE
        x = _aligned(x, padding)
        if addend is not None:
            addend = _aligned(addend, padding)
        late_bias = None
        if bias is not None and (bias.data_ptr() % ALIGNMENT or not bias.is_contiguous()):
            # A copy would lie elsewhere each time, and each place would have a plan of its own.
            bias, late_bias = None, bias
        operand = values if _is_operand(values, metadata) else self._staged(values, indices, metadata)
        y = x.new_empty(tokens + padding, rows)
        y_pointer = y.data_ptr()
        with on(self.device), self._handle.lock:
            plan = self._plans.get(
                tokens + padding,
                rows,
                columns,
                x.dtype,
                algorithm,
                0 if bias is None else bias.data_ptr(),
                addend is not None,
            )
            # Held until the product is queued: what is freed before may be given to another thread.
            workspace = x.new_empty(plan.workspace, dtype=torch.uint8) if plan.workspace else None
            plan.run(
                operand.data_ptr(),
                x.data_ptr(),
                y_pointer if addend is None else addend.data_ptr(),
                y_pointer,
                None if workspace is None else workspace.data_ptr(),
                self._stream(),
            )
        if padding:
            y = y[:tokens]
        return y if late_bias is None else y.add_(late_bias)

    def _takes_segment_k(self) -> bool:
        if segment_k.NAME not in self.findings:
            self.findings[segment_k.NAME] = segment_k.answers(self._handle.library.path, self.device)
        return self.findings[segment_k.NAME] is True

    def _stream(self) -> ctypes.Array:
        stream = stream_of(self.device)
        streams = self._streams.get(stream)
        if streams is None:
            streams = self._streams[stream] = (ctypes.c_void_p * 1)(stream)
        return streams

    def _staged(self, values: Tensor, indices: Tensor, metadata: Tensor | None) -> Tensor:
        """A copy of values and metadata as one operand, uint8."""
        rows, columns = values.shape[0], 2 * values.shape[1]
        if metadata is None:
            layout = self.metadata_layout(rows, columns, values.dtype)
            if layout is None:
                return self._compressor(rows, columns, values.dtype)(primitives.expand(values, indices))
            metadata = layout.vendor(indices)
        # One kernel for both: two copies take the host three times as long.
        return torch.cat((values.reshape(-1).view(torch.uint8), metadata))

    def _compressor(self, rows: int, columns: int, dtype: torch.dtype) -> Compressor:
        key = (rows, columns, dtype)
        compressor = self._compressors.get(key)
        if compressor is None:
            compressor = self._compressors[key] = Compressor(self._handle, rows, columns, dtype)
        return compressor

    def _layout(self, rows: int, columns: int, dtype: torch.dtype) -> MetadataLayout | str:
        """The layout of a shape, or why it could not be learned."""
        key = (rows, columns, dtype)
        with self._layouts_lock:
            if key not in self._layouts:
                compress = self._compressor(rows, columns, dtype)
                try:
                    self._layouts[key] = learn_layout(compress, rows, columns, dtype, self.device)
                except UnknownLayoutError as error:
                    self._layouts[key] = str(error)
                except torch.OutOfMemoryError as error:
                    raise VendorError(f"{NO_MEMORY} to learn how weights of {rows} x {columns} are ordered") from error
            return self._layouts[key]


def _generation(device: torch.device) -> int:
    """Major compute capability of a card; 0 of what is none."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _is_operand(values: Tensor, metadata: Tensor | None) -> bool:
    """Whether values and metadata lie in memory as the library's operand."""
    if metadata is None:
        return False
    start = values.data_ptr()
    adjacent = metadata.data_ptr() == start + values.nbytes
    return adjacent and not start % ALIGNMENT and values.is_contiguous() and metadata.is_contiguous()


def _aligned(matrix: Tensor, padding: int) -> Tensor:
    """A [T, ...] as the library takes it: contiguous, aligned, with rows of no meaning below; copied if need be."""
    if not padding and matrix.is_contiguous() and not matrix.data_ptr() % ALIGNMENT:
        return matrix
    tokens, width = matrix.shape
    copy = matrix.new_empty(tokens + padding, width)
    copy[:tokens].copy_(matrix)
    return copy
