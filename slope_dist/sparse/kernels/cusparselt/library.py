"""cuSPARSELt's C interface through ctypes: found, opened and described when first asked for, never at import.

Written against the header of 0.8.1 and meant for 0.8 and later, where every structure is 512 opaque bytes.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from ctypes import c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path

import torch

from slope_dist.sparse.kernels.vendor import VendorError, on

SONAME = "libcusparseLt.so.0"
OLDEST = (0, 8, 0)

STRUCTURE_BYTES = 512
STRUCTURE_ALIGNMENT = 16
# Room beyond what the header states: a later library that writes more must not write over something else.
_ROOM_BYTES = 4 * STRUCTURE_BYTES

# cusparse.h and library_types.h of CUDA.
OPERATION_NON_TRANSPOSE, OPERATION_TRANSPOSE = 0, 1
ORDER_COL, ORDER_ROW = 1, 2
DATA_TYPES = {torch.float16: 2, torch.bfloat16: 14}
MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL = 0, 1, 2
STATUS_SUCCESS = 0

CONSTANTS = {
    "CUSPARSELT_SPARSITY_50_PERCENT": 0,
    "CUSPARSE_COMPUTE_32F": 2,
    "CUSPARSELT_MATMUL_BIAS_POINTER": 8,
    "CUSPARSELT_MATMUL_ALG_DEFAULT": 0,
    "CUSPARSELT_MATMUL_ALG_CONFIG_ID": 0,
    "CUSPARSELT_MATMUL_ALG_CONFIG_MAX_ID": 1,
    "CUSPARSELT_MATMUL_SPLIT_K": 3,
}
"""Enumerators of cusparseLt.h by their names there."""

PROTOTYPES: dict[str, list] = {
    "cusparseLtInit": [c_void_p],
    "cusparseLtDestroy": [c_void_p],
    "cusparseLtGetProperty": [c_int, c_void_p],
    "cusparseLtGetErrorName": [c_int],
    "cusparseLtGetErrorString": [c_int],
    "cusparseLtDenseDescriptorInit": [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_uint32, c_int, c_int],
    "cusparseLtStructuredDescriptorInit": [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_uint32, *[c_int] * 3],
    "cusparseLtMatDescriptorDestroy": [c_void_p],
    "cusparseLtMatmulDescriptorInit": [c_void_p, c_void_p, c_int, c_int, *[c_void_p] * 4, c_int],
    "cusparseLtMatmulDescSetAttribute": [c_void_p, c_void_p, c_int, c_void_p, c_size_t],
    "cusparseLtMatmulAlgSelectionInit": [c_void_p, c_void_p, c_void_p, c_int],
    "cusparseLtMatmulAlgSelectionDestroy": [c_void_p],
    "cusparseLtMatmulAlgSetAttribute": [c_void_p, c_void_p, c_int, c_void_p, c_size_t],
    "cusparseLtMatmulAlgGetAttribute": [c_void_p, c_void_p, c_int, c_void_p, c_size_t],
    "cusparseLtMatmulGetWorkspace": [c_void_p, c_void_p, c_void_p],
    "cusparseLtMatmulPlanInit": [c_void_p, c_void_p, c_void_p, c_void_p],
    "cusparseLtMatmulPlanDestroy": [c_void_p],
    "cusparseLtMatmul": [*[c_void_p] * 10, c_int32],
    "cusparseLtSpMMACompressedSize2": [c_void_p, c_void_p, c_void_p, c_void_p],
    "cusparseLtSpMMACompress2": [c_void_p, c_void_p, c_int, c_int, c_void_p, c_void_p, c_void_p, c_void_p],
}
"""Parameters of every function that is called, as ctypes pass them; every pointer is a `c_void_p`."""


class StatusError(VendorError):
    """A call returned other than success: which, and the library's own words for why."""

    def __init__(self, version: str, call: str, status: int, name: str, words: str) -> None:
        super().__init__(f"cuSPARSELt {version}: {call} returned {name} ({words})")
        self.call = call
        self.status = status
        self.status_name = name


def candidates() -> list[Path]:
    """Installed copies of the library, in the order of `sys.path`: those that torch's CUDA wheels depend on."""
    folders = ("nvidia/cusparselt/lib", "nvidia/cu13/lib")
    paths = (Path(entry) / folder / SONAME for entry in sys.path for folder in folders)
    return [path for path in paths if path.is_file()]


class Library:
    """An open cuSPARSELt.

    Attributes:
        path: what was opened: a file, or a bare name that the loader found.
        version: "major.minor.patch", asked of the library part by part, since its one-number encoding has changed.

    Raises:
        VendorError: if it cannot be opened, lacks a function, or is older than `OLDEST`.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = str(path or next(iter(candidates()), SONAME))
        try:
            library = ctypes.CDLL(self.path)
            self._functions = {name: getattr(library, name) for name in PROTOTYPES}
        except (OSError, AttributeError) as error:
            raise VendorError(f"cuSPARSELt cannot be opened: {' '.join(str(error).split())}") from error
        for name, parameters in PROTOTYPES.items():
            self._functions[name].argtypes = parameters
            self._functions[name].restype = c_char_p if "GetError" in name else c_int
        self.version = "of unknown version"
        parts = tuple(self._property(part) for part in (MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL))
        self.version = ".".join(map(str, parts))
        if parts < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise VendorError(f"cuSPARSELt {self.version} ({self.path}) is older than {oldest}, the oldest supported")
        self.matmul = self._functions["cusparseLtMatmul"]

    def call(self, name: str, *arguments: object) -> None:
        """Call a function.

        Raises:
            StatusError: if it returns other than success.
        """
        self.check(name, self._functions[name](*arguments))

    def check(self, name: str, status: int) -> None:
        """Raise `StatusError` for a status other than success that the function of this name returned."""
        if status != STATUS_SUCCESS:
            words = [self._functions[f"cusparseLtGetError{what}"](status) for what in ("Name", "String")]
            raise StatusError(self.version, name, status, *(word.decode(errors="replace") for word in words))

    def _property(self, part: int) -> int:
        value = c_int()
        self.call("cusparseLtGetProperty", part, ctypes.byref(value))
        return value.value


class Structure:
    """Memory of one opaque structure; `pointer` is passed for it."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(_ROOM_BYTES + STRUCTURE_ALIGNMENT)
        address = ctypes.addressof(self._memory)
        self.pointer = c_void_p(address + -address % STRUCTURE_ALIGNMENT)


class Handle:
    """The library's context on one device, shared by all threads.

    Whoever calls the library holds `lock`: nothing says that a handle bears two calls at once. It is reentrant because
    plans are destroyed when the last reference to them goes, which may be while it is held.

    Raises:
        StatusError: if the library cannot be initialised on the device.
    """

    def __init__(self, library: Library, device: torch.device) -> None:
        self.library = library
        self.device = device
        self.lock = threading.RLock()
        self._structure = Structure()
        self.pointer = self._structure.pointer
        with on(device):
            # Makes the device's context, should this be the first that is asked of it.
            torch.empty(1, device=device)
            library.call("cusparseLtInit", self.pointer)

    def call(self, name: str, *arguments: object) -> None:
        """Call a function that takes the handle first, on the handle's device.

        Raises:
            StatusError: if it returns other than success.
        """
        with self.lock, on(self.device):
            self.library.call(name, self.pointer, *arguments)

    def destroy(self, made: list[tuple[str, Structure]]) -> None:
        """Call the destructors of structures, last made first."""
        with self.lock, on(self.device):
            while made:
                name, structure = made.pop()
                self.library.call(name, structure.pointer)
