"""What a card can do at most, and the time that a product must take on it at least."""

from __future__ import annotations

import torch

from slope_dist.planning.gpus import Peaks, peaks_of


def peaks_on(device: torch.device, dtype: torch.dtype) -> Peaks | None:
    """Of a device; they are those of 16 bits: None for another dtype, on the CPU, and where they are not known."""
    return peaks_of(torch.cuda.get_device_name(device)) if device.type == "cuda" and dtype.itemsize == 2 else None


def least_seconds(peaks: Peaks, tokens: int, rows: int, columns: int, *, sparse: bool, itemsize: int = 2) -> float:
    """The roofline of Y [T, O] = X [T, I] W^T: its arithmetic, or X, W and Y through memory once, if that is longer.

    A 2:4 weight is half its values and a bit an element of metadata.
    """
    weight = rows * columns * (itemsize / 2 + 1 / 8 if sparse else itemsize)
    moved = (tokens * columns + tokens * rows) * itemsize + weight
    operations = 2 * tokens * rows * columns / (peaks.sparse if sparse else peaks.dense)
    return max(operations, moved / peaks.bandwidth)
