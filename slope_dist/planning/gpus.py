"""The GPUs that this package knows: memory and peaks, as their maker gives them."""

from __future__ import annotations

from dataclasses import dataclass

TERA, GIGA = 10**12, 10**9


@dataclass(frozen=True)
class Peaks:
    """What a card could do at most, for 16-bit floats.

    Attributes:
        dense: floating-point operations a second of the tensor cores.
        sparse: of 2:4 products, counted as if they were dense.
        bandwidth: bytes a second of the memory.
    """

    dense: float
    sparse: float
    bandwidth: float


@dataclass(frozen=True)
class _Card:
    kind: str
    memory: int
    peaks: Peaks


def _card(kind: str, memory: int, dense: float, bandwidth: int) -> _Card:
    return _Card(kind, memory * GIGA, Peaks(dense * TERA, 2 * dense * TERA, bandwidth * GIGA))


# By torch's whole name: a slice of a card, or another card of the same chip, has a longer name and other peaks. GB,
# dense bf16 TFLOPS with fp32 sums, GB/s, as others quote NVIDIA's data sheets; the sheets themselves were not at hand.
# The reckoning SMs x operations a clock x boost clock gives the same TFLOPS within 0.1 %: 108 x 2048 x 1.41 GHz,
# 132 x 4096 x 1.83, 114 x 4096 x 1.62.
_CARDS = {
    "NVIDIA A100-SXM4-40GB": _card("a100-40gb", 40, 312, 1555),
    "NVIDIA A100-PCIE-40GB": _card("a100-40gb", 40, 312, 1555),
    "NVIDIA A100-SXM4-80GB": _card("a100-80gb", 80, 312, 2039),
    "NVIDIA A100 80GB PCIe": _card("a100-80gb", 80, 312, 1935),
    "NVIDIA H100 80GB HBM3": _card("h100-80gb", 80, 989.4, 3350),
    "NVIDIA H100 PCIe": _card("h100-80gb", 80, 756, 2000),
    "NVIDIA H200": _card("h200-141gb", 141, 989.4, 4800),
}

GPU_MEMORY: dict[str, int] = {card.kind: card.memory for card in _CARDS.values()}
"""Bytes of the GPUs that a config can name in `parallel.gpu`, as the makers' data sheets give them. The cards report a
little more to programs, so this errs on the safe side."""


def peaks_of(card: str) -> Peaks | None:
    """The peaks of a card by the name that torch has for it; None where they are not known here."""
    found = _CARDS.get(card)
    return None if found is None else found.peaks


def peaks_of_kind(kind: str) -> Peaks:
    """The peaks of a kind that a config can name; of its cards with other clocks, the fastest."""
    return max((card.peaks for card in _CARDS.values() if card.kind == kind), key=lambda peaks: peaks.dense)


def kind_of(card: str) -> str | None:
    """The kind of a card by the name that torch has for it; None where it is not known here."""
    found = _CARDS.get(card)
    return None if found is None else found.kind
