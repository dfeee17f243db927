"""A compiled kernel as Python sees it: plain C functions, no torch headers."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int, c_void_p
from pathlib import Path

from slope_dist.sparse.kernels.vendor import VendorError

PROTOTYPES = {
    "slope_product": (
        c_int,
        # rows, columns, tokens; values, metadata, x, bias, addend, y; device, processors; stream
        [c_int] * 3 + [c_void_p] * 6 + [c_int] * 2 + [c_void_p],
    ),
    "slope_reason": (c_char_p, [c_int]),
}
"""Of every library: what a function returns and takes."""


class Library:
    """One tile shape for one element type and architecture.

    Raises:
        VendorError: if the file is not such a library.
    """

    def __init__(self, path: Path) -> None:
        try:
            opened = ctypes.CDLL(str(path))
            for name, (returned, taken) in PROTOTYPES.items():
                function = getattr(opened, name)
                function.restype, function.argtypes = returned, taken
        except (OSError, AttributeError) as error:
            raise VendorError(f"{path} is no compiled kernel: {error}") from error
        self.product = opened.slope_product
        self._reason = opened.slope_reason

    def reason(self, code: int) -> str:
        """What a code that is not 0 means."""
        return self._reason(code).decode()
