"""The kernels that exist: for each architecture a few shapes of tile, each compiled for each element type."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slope_dist.sparse.kernels.vendor import Algorithm

ELEMENTS = {torch.float16: "cutlass::half_t", torch.bfloat16: "cutlass::bfloat16_t"}
"""Element types by their names in CUTLASS."""

ARCHITECTURES = {(8, 0): "sm_80", (9, 0): "sm_90a"}
"""By compute capability. Other cards have less shared memory than these tiles need, or other instructions."""

SOURCES = {"sm_80": "sm80.cu", "sm_90a": "sm90.cu"}


@dataclass(frozen=True)
class Tile(Algorithm):
    """One way to compute a product: Y is made in parts of `tokens` x `rows`, 64 columns of W at a time.

    Sums are made in one order whatever else runs, so equal inputs give equal bits.
    """

    architecture: str
    rows: int
    tokens: int
    settings: tuple[tuple[str, int], ...]
    """Macros of the source, in words of its own."""

    suffix: str = ""

    def __str__(self) -> str:
        return f"{self.rows}x{self.tokens}{self.suffix}"

    def macros(self, dtype: torch.dtype) -> dict[str, str]:
        """What the source is compiled with."""
        sizes = {"SLOPE_TILE_M": str(self.rows), "SLOPE_TILE_N": str(self.tokens)}
        return {"SLOPE_ELEMENT": ELEMENTS[dtype]} | sizes | {name: str(value) for name, value in self.settings}


def _ampere(rows: int, tokens: int, warp_rows: int, warp_tokens: int, stages: int) -> Tile:
    settings = (("SLOPE_WARP_M", warp_rows), ("SLOPE_WARP_N", warp_tokens), ("SLOPE_STAGES", stages))
    return Tile("sm_80", rows, tokens, settings)


def _hopper(rows: int, tokens: int, cluster: int, cooperative: bool) -> Tile:
    settings = (("SLOPE_CLUSTER_M", cluster), ("SLOPE_COOPERATIVE", int(cooperative)))
    return Tile("sm_90a", rows, tokens, settings, "" if cooperative else "p")


TILES = {
    "sm_80": (
        _ampere(128, 128, 64, 64, 3),
        _ampere(256, 128, 64, 64, 3),
        _ampere(128, 256, 64, 64, 3),
        _ampere(128, 64, 64, 32, 4),
    ),
    "sm_90a": (
        _hopper(128, 256, 2, cooperative=True),
        _hopper(256, 128, 2, cooperative=True),
        _hopper(128, 128, 2, cooperative=False),
        _hopper(128, 64, 1, cooperative=False),
    ),
}
"""By architecture. Large tiles for many tokens, the last of each for few; which is best is for measurement to say."""
