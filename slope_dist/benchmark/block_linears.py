"""The linear layers of a block, as one tensor rank holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slope_dist.config import Config
from slope_dist.errors import UserError
from slope_dist.layers import LayerFactory, Linear
from slope_dist.models import family
from slope_dist.parallel.regions import TensorPlace
from slope_dist.planning.shapes import shape_of
from slope_dist.sparse import Pattern
from slope_dist.sparse.pattern import CUT_MULTIPLE

TWO_FOUR = Pattern(2, 4)

SECOND_BLOCK = 1
"""The first block's first linears are dense; all blocks after it are alike."""


@dataclass(frozen=True)
class BlockLinear:
    """One of them: its name within the block, and O and I of a tensor rank's part."""

    name: str
    rows: int
    columns: int


def block_linears(config: Config, ranks: int = 1) -> list[BlockLinear]:
    """The 2:4 linears of a block on one of `ranks` tensor ranks.

    Raises:
        UserError: if they do not divide.
    """
    factory = LayerFactory(seed=0, pattern=TWO_FOUR, device="meta", place=TensorPlace(0, ranks))
    try:
        block = family(config.model.family).block(factory, shape_of(config.model), SECOND_BLOCK)
    except ValueError as error:
        raise UserError(f"{ranks} tensor ranks: {error}") from error
    layers = [module for module in block.modules() if isinstance(module, Linear)]
    return [BlockLinear(layer.name.rpartition(".")[2], *layer.weight.shape) for layer in layers]


@dataclass(frozen=True)
class Matrix:
    """O and I of a weight, who has one ("opt66b fc1, tensor 2"), and the fewest tensor ranks that make it so."""

    rows: int
    columns: int
    ranks: int
    uses: tuple[str, ...]


def matrices(configs: Sequence[tuple[str, Config]], tensor_ranks: Sequence[int]) -> list[Matrix]:
    """The different weights in the blocks of some models, by the fewest tensor ranks, the largest first.

    What does not divide among ranks, or not into whole bytes of metadata, is left out.
    """
    found: dict[tuple[int, int], tuple[int, list[str]]] = {}
    for ranks in sorted(tensor_ranks):
        for name, config in configs:
            try:
                linears = block_linears(config, ranks)
            except UserError:
                continue
            for linear in linears:
                if linear.rows % CUT_MULTIPLE or linear.columns % CUT_MULTIPLE:
                    continue
                _, uses = found.setdefault((linear.rows, linear.columns), (ranks, []))
                uses.append(f"{name} {linear.name}" + (f", tensor {ranks}" if ranks > 1 else ""))
    made = [Matrix(*shape, ranks, tuple(uses)) for shape, (ranks, uses) in found.items()]
    return sorted(made, key=lambda matrix: (matrix.ranks, -matrix.rows * matrix.columns, matrix.rows))


def config_name(path: str | Path) -> str:
    """What a config is called in tables."""
    return Path(path).stem
