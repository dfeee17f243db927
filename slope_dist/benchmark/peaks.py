"""The time that a product must take on a card at least."""

from __future__ import annotations

from slope_dist.planning.gpus import Peaks


def least_seconds(peaks: Peaks, tokens: int, rows: int, columns: int, *, sparse: bool, itemsize: int = 2) -> float:
    """The roofline of Y [T, O] = X [T, I] W^T: its arithmetic, or X, W and Y through memory once, if that is longer.

    A 2:4 weight is half its values and a bit an element of metadata.
    """
    weight = rows * columns * (itemsize / 2 + 1 / 8 if sparse else itemsize)
    moved = (tokens * columns + tokens * rows) * itemsize + weight
    operations = 2 * tokens * rows * columns / (peaks.sparse if sparse else peaks.dense)
    return max(operations, moved / peaks.bandwidth)
