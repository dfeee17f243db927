"""Initial values as a function of (seed, global name, coordinates), never of rank or layout (rule R3).

A matrix is drawn in blocks of 256 x 256, each from a counter-based generator keyed by a hash of its name and
position; a
shard draws the blocks it touches. Philox and the ziggurat in NumPy give the same bits on every processor, which torch's
vectorised normal does not promise.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

BLOCK = 256


def _block(seed: int, name: str, row: int, column: int) -> np.ndarray:
    text = f"slope_dist initial values v1/{seed}/{name}/{row}/{column}"
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key)).standard_normal((BLOCK, BLOCK), dtype=np.float32)


def normal(
    seed: int,
    name: str,
    shape: tuple[int, int],
    std: float,
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
) -> Tensor:
    """Part of a matrix of independent normals with mean 0.

    Args:
        seed: `run.seed`.
        name: global name of the tensor.
        shape: global (rows, columns).
        std: standard deviation.
        rows: half-open range of global rows wanted; None means all.
        columns: half-open range of global columns wanted; None means all.

    Returns:
        fp32 on the CPU, of the size of the part. Any two calls agree where their parts overlap, bit for bit.
    """
    first_row, end_row = rows or (0, shape[0])
    first_column, end_column = columns or (0, shape[1])
    # NumPy to the end: torch's constructors follow ambient dtypes and devices, and DeepSpeed wraps them to do so.
    part = np.empty((end_row - first_row, end_column - first_column), dtype=np.float32)
    for block_row in range(first_row // BLOCK, -(-end_row // BLOCK)):
        origin_row = block_row * BLOCK
        top, bottom = max(first_row, origin_row), min(end_row, origin_row + BLOCK)
        for block_column in range(first_column // BLOCK, -(-end_column // BLOCK)):
            origin_column = block_column * BLOCK
            left, right = max(first_column, origin_column), min(end_column, origin_column + BLOCK)
            part[top - first_row : bottom - first_row, left - first_column : right - first_column] = _block(
                seed, name, block_row, block_column
            )[top - origin_row : bottom - origin_row, left - origin_column : right - origin_column]
    part *= np.float32(std)
    return torch.from_numpy(part)
