"""What the error of a candidate means: it cannot do this, there was no memory for it, or it broke the device."""

from __future__ import annotations

import torch

from slope_dist.sparse.kernels.vendor import NO_MEMORY, VendorError

CRASHED = "crashed"
"""How a reason begins for which a candidate is never tried again."""

_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")
"""In what torch's allocator, CUDA, Triton and the vendors' libraries say."""

_BREAKING = (
    "illegal memory access",
    "unspecified launch failure",
    "device-side assert",
    "misaligned address",
    "illegal instruction",
    "illegal address",
    "launch timed out",
    "hardware stack error",
    "uncorrectable ECC",
)
"""In CUDA's words for errors after which every call of the process fails."""


def reason_of(error: Exception) -> str:
    """Why a candidate is not taken, in one line; it begins with `NO_MEMORY` if that is all that is wrong."""
    text = (str(error).strip() or "no reason given").splitlines()[0][:200]
    if not isinstance(error, VendorError):
        text = f"{type(error).__name__}: {text}"
    short = isinstance(error, torch.OutOfMemoryError) or any(words in text for words in _OUT_OF_MEMORY)
    return f"{NO_MEMORY}: {text}" if short and not text.startswith(NO_MEMORY) else text


def breaks_device(error: Exception, device: torch.device) -> bool:
    """Whether after this error nothing more runs on the device in this process."""
    if any(words in str(error) for words in _BREAKING):
        return True
    if device.type != "cuda":
        return False
    # The words may be a library's own, which says no more than that the execution failed.
    try:
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return False
    except RuntimeError:
        return True
    return False
