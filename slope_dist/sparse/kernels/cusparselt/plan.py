"""Plans of products, kept for the calls to come, and the compressor.

A plan is made once for each (T, O, I, dtype, bias, addend or none, algorithm). It holds no pointer but its bias's,
which cuSPARSELt takes as an attribute when the plan is made and not when it runs; that a later change of the attribute
reaches the plan stands nowhere. So the bias's address is part of the key: a parameter stays where it is, and one that
is gathered anew each step costs a plan for each place it comes to lie in.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import OrderedDict
from ctypes import c_float, c_int, c_size_t, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from slope_dist.sparse.kernels import vendor
from slope_dist.sparse.kernels.cusparselt.library import (
    CONSTANTS,
    DATA_TYPES,
    OPERATION_NON_TRANSPOSE,
    OPERATION_TRANSPOSE,
    ORDER_COL,
    ORDER_ROW,
    Handle,
    StatusError,
    Structure,
)

ALIGNMENT = 16
"""Bytes; of every pointer that a product is given."""

SEGMENT_K = -1
"""As `split_k`: Hopper's way to share one product's columns among thread blocks."""


@dataclass(frozen=True)
class Algorithm(vendor.Algorithm):
    """A kernel by its number, which means nothing beyond one version, dtype and layout; 1 or `SEGMENT_K` as split."""

    config: int
    split_k: int = 1

    @property
    def deterministic(self) -> bool:
        """Split sums may be joined in any order."""
        return self.split_k == 1

    def __str__(self) -> str:
        return f"{self.config}" + ("" if self.split_k == 1 else " segment-k")


class Description:
    """The descriptors of Y [T, O] = X [T, I] W^T, computed as Y^T = W X^T.

    W, compressed, is the structured operand and row-major; X^T and Y^T are X and Y as they lie, so nothing is
    transposed.

    Raises:
        StatusError: if the library refuses the shape.
    """

    def __init__(self, handle: Handle, tokens: int, rows: int, columns: int, dtype: torch.dtype, bias: int) -> None:
        self.handle = handle
        self.made: list[tuple[str, Structure]] = []
        # Never at exit: the CUDA context may be gone by then.
        weakref.finalize(self, handle.destroy, self.made).atexit = False
        kind = DATA_TYPES[dtype]
        weight = structured_descriptor(handle, self.made, rows, columns, dtype)
        x = self._dense(tokens, columns, columns, kind, ORDER_ROW)
        addend, y = (self._dense(rows, tokens, rows, kind, ORDER_COL) for _ in range(2))
        self.matmul = Structure()
        handle.call(
            "cusparseLtMatmulDescriptorInit",
            self.matmul.pointer,
            OPERATION_NON_TRANSPOSE,
            OPERATION_TRANSPOSE,
            *(part.pointer for part in (weight, x, addend, y)),
            CONSTANTS["CUSPARSE_COMPUTE_32F"],
        )
        if bias:
            self._set("MatmulDesc", self.matmul, "BIAS_POINTER", c_void_p(bias))
        self.selection = Structure()
        algorithm = CONSTANTS["CUSPARSELT_MATMUL_ALG_DEFAULT"]
        handle.call("cusparseLtMatmulAlgSelectionInit", self.selection.pointer, self.matmul.pointer, algorithm)
        self.made.append(("cusparseLtMatmulAlgSelectionDestroy", self.selection))

    def select(self, algorithm: Algorithm) -> None:
        """Choose an algorithm; raises StatusError if there is none of this number."""
        self._set("MatmulAlg", self.selection, "ALG_CONFIG_ID", c_int(algorithm.config))
        # Also where it is 1: left alone, the library may choose.
        self._set("MatmulAlg", self.selection, "SPLIT_K", c_int(algorithm.split_k))

    def configs(self) -> list[int]:
        """Numbers of the algorithms there are."""
        highest = c_int()
        attribute = CONSTANTS["CUSPARSELT_MATMUL_ALG_CONFIG_MAX_ID"]
        place = ctypes.byref(highest), ctypes.sizeof(highest)
        self.handle.call("cusparseLtMatmulAlgGetAttribute", self.selection.pointer, attribute, *place)
        found = []
        # Whether the highest is itself a number of one is told differently in different places.
        for config in range(highest.value + 1):
            try:
                self.select(Algorithm(config))
            except StatusError:
                continue
            found.append(config)
        return found

    def _dense(self, rows: int, columns: int, leading: int, kind: int, order: int) -> Structure:
        structure = Structure()
        shape = rows, columns, leading, ALIGNMENT, kind, order
        self.handle.call("cusparseLtDenseDescriptorInit", structure.pointer, *shape)
        self.made.append(("cusparseLtMatDescriptorDestroy", structure))
        return structure

    def _set(self, of: str, structure: Structure, attribute: str, value: ctypes._SimpleCData) -> None:
        number = CONSTANTS[f"CUSPARSELT_MATMUL_{attribute}"]
        place = ctypes.byref(value), ctypes.sizeof(value)
        self.handle.call(f"cusparseLt{of}SetAttribute", structure.pointer, number, *place)


class Plan:
    """A product ready to run.

    Attributes:
        workspace: bytes of scratch that `run` must be given.

    Raises:
        StatusError: if the library cannot compute it in this way.
    """

    def __init__(self, description: Description, algorithm: Algorithm, accumulate: bool) -> None:
        handle = description.handle
        self._description = description
        description.select(algorithm)
        plan = Structure()
        parts = (plan, description.matmul, description.selection)
        handle.call("cusparseLtMatmulPlanInit", *(part.pointer for part in parts))
        description.made.append(("cusparseLtMatmulPlanDestroy", plan))
        size = c_size_t()
        handle.call("cusparseLtMatmulGetWorkspace", plan.pointer, ctypes.byref(size))
        self.workspace = size.value
        self._handle = handle.pointer
        self._pointer = plan.pointer
        self._matmul = handle.library.matmul
        self._library = handle.library
        # Kept beside the pointers into them.
        self._scalars = c_float(1.0), c_float(1.0 if accumulate else 0.0)
        self._alpha, self._beta = (ctypes.pointer(scalar) for scalar in self._scalars)

    def run(self, operand: int, x: int, addend: int, y: int, workspace: int | None, stream: ctypes.Array) -> None:
        """Queue the product: addresses of [values | metadata], X, the addend (Y if there is none), Y and the scratch.

        The caller holds the handle's lock and has made its device the current one.

        Raises:
            StatusError: if the library refuses.
        """
        status = self._matmul(
            self._handle, self._pointer, self._alpha, operand, x, self._beta, addend, y, workspace, stream, 1
        )
        if status:
            self._library.check("cusparseLtMatmul", status)


class PlanCache:
    """The plans of one handle that were used last, at most `limit`; one that falls out is destroyed when unused."""

    def __init__(self, handle: Handle, limit: int) -> None:
        self._handle = handle
        self._limit = limit
        self._plans: OrderedDict[tuple, Plan] = OrderedDict()

    def get(
        self,
        tokens: int,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        algorithm: Algorithm,
        bias: int,
        accumulate: bool,
    ) -> Plan:
        """The plan of a product, `bias` being an address or 0; the caller holds the handle's lock."""
        key = (tokens, rows, columns, dtype, algorithm.config, algorithm.split_k, bias, accumulate)
        plan = self._plans.get(key)
        if plan is not None:
            self._plans.move_to_end(key)
            return plan
        description = Description(self._handle, tokens, rows, columns, dtype, bias)
        plan = self._plans[key] = Plan(description, algorithm, accumulate)
        if len(self._plans) > self._limit:
            self._plans.popitem(last=False)
        return plan


class Compressor:
    """cuSPARSELt's own compression of one shape.

    Attributes:
        size: bytes of a compressed matrix.

    Raises:
        StatusError: if the library refuses the shape.
    """

    def __init__(self, handle: Handle, rows: int, columns: int, dtype: torch.dtype) -> None:
        self._handle = handle
        self._made: list[tuple[str, Structure]] = []
        weakref.finalize(self, handle.destroy, self._made).atexit = False
        self._descriptor = structured_descriptor(handle, self._made, rows, columns, dtype)
        size, scratch = c_size_t(), c_size_t()
        places = ctypes.byref(size), ctypes.byref(scratch)
        handle.call("cusparseLtSpMMACompressedSize2", self._descriptor.pointer, *places)
        self.size, self._scratch = size.value, scratch.value

    def __call__(self, dense: Tensor) -> Tensor:
        """Compress a contiguous [O, I] with at most two nonzeros a group: uint8 [size], the library's operand.

        Raises:
            StatusError: if the library refuses.
        """
        assert dense.is_contiguous()
        operand = dense.new_empty(self.size, dtype=torch.uint8)
        scratch = dense.new_empty(self._scratch, dtype=torch.uint8)
        self._handle.call(
            "cusparseLtSpMMACompress2",
            self._descriptor.pointer,
            1,
            OPERATION_NON_TRANSPOSE,
            dense.data_ptr(),
            operand.data_ptr(),
            scratch.data_ptr(),
            vendor.stream_of(dense.device),
        )
        return operand


def structured_descriptor(
    handle: Handle, made: list[tuple[str, Structure]], rows: int, columns: int, dtype: torch.dtype
) -> Structure:
    """Descriptor of a row-major 2:4 matrix [O, I], put into the list of what is to be destroyed."""
    structure = Structure()
    kind, sparsity = DATA_TYPES[dtype], CONSTANTS["CUSPARSELT_SPARSITY_50_PERCENT"]
    shape = rows, columns, columns, ALIGNMENT, kind, ORDER_ROW, sparsity
    handle.call("cusparseLtStructuredDescriptorInit", structure.pointer, *shape)
    made.append(("cusparseLtMatDescriptorDestroy", structure))
    return structure
