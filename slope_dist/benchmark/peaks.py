"""What cards could do at most, by their makers' data sheets, and the time that a product must take on them at least."""

from __future__ import annotations

from dataclasses import dataclass

TERA, GIGA = 10**12, 10**9


@dataclass(frozen=True)
class Peaks:
    """Of one card, for 16-bit floats.

    Attributes:
        dense: floating-point operations a second of the tensor cores.
        sparse: of 2:4 products, counted as if they were dense.
        bandwidth: bytes a second of the memory.
    """

    dense: float
    sparse: float
    bandwidth: float


def _peaks(dense_tera: float, bandwidth_giga: float) -> Peaks:
    return Peaks(dense_tera * TERA, 2 * dense_tera * TERA, bandwidth_giga * GIGA)


_CARDS = {
    "NVIDIA A100-SXM4-40GB": _peaks(312, 1555),
    "NVIDIA A100-PCIE-40GB": _peaks(312, 1555),
    "NVIDIA A100-SXM4-80GB": _peaks(312, 2039),
    "NVIDIA A100 80GB PCIe": _peaks(312, 1935),
    "NVIDIA H100 80GB HBM3": _peaks(989.5, 3350),
    "NVIDIA H100 PCIe": _peaks(756.5, 2000),
    "NVIDIA H200": _peaks(989.5, 4800),
}


def peaks_of(card: str) -> Peaks | None:
    """The peaks of a card by the name that torch has for it; None where they are not known here."""
    return _CARDS.get(card)


def least_seconds(peaks: Peaks, tokens: int, rows: int, columns: int, *, sparse: bool, itemsize: int = 2) -> float:
    """The roofline of Y [T, O] = X [T, I] W^T: its arithmetic, or X, W and Y through memory once, if that is longer.

    A 2:4 weight is half its values and a bit an element of metadata.
    """
    weight = rows * columns * (itemsize / 2 + 1 / 8 if sparse else itemsize)
    moved = (tokens * columns + tokens * rows) * itemsize + weight
    operations = 2 * tokens * rows * columns / (peaks.sparse if sparse else peaks.dense)
    return max(operations, moved / peaks.bandwidth)
