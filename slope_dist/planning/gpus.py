"""Memory of the GPUs that a config can name in `parallel.gpu`."""

from __future__ import annotations

GPU_MEMORY: dict[str, int] = {
    "a100-40gb": 40 * 10**9,
    "a100-80gb": 80 * 10**9,
    "h100-80gb": 80 * 10**9,
    "h200-141gb": 141 * 10**9,
}
"""Bytes, as the makers' data sheets give them. The cards report a little more to programs, so this errs on the safe
side."""
