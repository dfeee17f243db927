"""How long a product takes on a card: from a file of measurements (`tools/benchmark.py gemm`), or from its peaks.

Shape letters: T tokens, O out, I in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, Protocol

from slope_dist.config.sections import Precision
from slope_dist.errors import UserError
from slope_dist.files import read_bounded
from slope_dist.planning.gpus import Peaks, kind_of

Kind = Literal["forward", "input gradient", "weight gradient"]

_MEASURED: tuple[Kind, ...] = ("forward", "input gradient")
_LARGEST_FILE = 2**28

_DTYPES: dict[Precision, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""What files of results call them."""

DENSE_SHARE = 0.65
"""The share of a card's dense peak that large dense products are taken to reach where nothing is measured."""

_GAIN = {"a100-40gb": 1.5, "a100-80gb": 1.5, "h100-80gb": 1.3, "h200-141gb": 1.3}
"""How much faster 2:4 products of at least `LEAST_TOKENS` and `LEAST_COLUMNS` are taken to be than dense ones where
nothing is measured: in the middle of what others report, who find 1.2 to 1.6 on A100 and 1.2 to 1.5 on Hopper, where
the maker's data sheets say 2."""

LEAST_TOKENS = 512
LEAST_COLUMNS = 2048
"""Below so many of either, others have found no gain."""


@dataclass(frozen=True)
class Product:
    """Y [T, O] = X [T, I] W^T, its input gradient, or its weight gradient, which is dense for 2:4 weights too."""

    kind: Kind
    tokens: int
    rows: int
    columns: int
    sparse: bool

    @property
    def flops(self) -> int:
        """Operations of the dense product."""
        return 2 * self.tokens * self.rows * self.columns

    @property
    def may_be_sparse(self) -> bool:
        """Whether 2:4 arithmetic may be used."""
        return self.sparse and self.kind != "weight gradient"


class ProductTimes(Protocol):
    """Seconds of products on one kind of card."""

    basis: str

    def seconds(self, wanted: Product) -> float:
        """Of one product."""


class Roofline:
    """From peaks and assumptions: nothing here is measured.

    Args:
        gpu: kind of the card.
        peaks: its peaks.
        width: bytes of an element; 4 takes the card's fp32 arithmetic to be as fast as its 16-bit one, which flatters.
    """

    def __init__(self, gpu: str, peaks: Peaks, width: int = 2) -> None:
        self._gain = _GAIN[gpu]
        self._peaks = peaks
        self._width = width
        self.basis = (
            f"assumed, not measured: dense products reach {DENSE_SHARE:.0%} of the peak of {peaks.dense / 1e12:g} "
            f"TFLOPS, and 2:4 ones of {LEAST_TOKENS} tokens and {LEAST_COLUMNS:,} columns or more are "
            f"{self._gain:g} times as fast"
        )

    def seconds(self, wanted: Product) -> float:
        """Arithmetic, or memory once for each operand if that takes longer."""
        gain = 1.0
        weight = wanted.rows * wanted.columns * self._width
        if wanted.may_be_sparse:
            pays = wanted.tokens >= LEAST_TOKENS and wanted.columns >= LEAST_COLUMNS
            gain = self._gain if pays else 1.0
            weight = weight // 2 + wanted.rows * wanted.columns // 8
        moved = (wanted.tokens * (wanted.rows + wanted.columns)) * self._width + weight
        return max(wanted.flops / (self._peaks.dense * DENSE_SHARE * gain), moved / self._peaks.bandwidth)


class Measured:
    """From the rows of a file of `tools/benchmark.py gemm`.

    A product that is in the file takes what was measured. Another one runs at the operations a second of the nearest
    that is: in its tokens, rows and columns, by the sum of the logarithms of their ratios.

    Args:
        rows: of the file, all of one dtype.
        basis: what to say of them.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], basis: str) -> None:
        self.basis = basis
        # (kind, sparse) -> (tokens, rows, columns) -> seconds.
        self._seconds: dict[tuple[str, bool], dict[tuple[int, int, int], float]] = {}
        for row in rows:
            shape = int(row["tokens"]), int(row["rows"]), int(row["columns"])
            for sparse, rival in ((False, "dense"), (True, "dispatcher")):
                if rival in row["rivals"]:
                    found = self._seconds.setdefault((row["kind"], sparse), {})
                    found[shape] = float(row["rivals"][rival]["seconds"])

    def seconds(self, wanted: Product) -> float:
        """Of one product."""
        # A weight gradient is a dense product of the same operations; the file has the two of the weight itself.
        kind = "forward" if wanted.kind == "weight gradient" else wanted.kind
        found = self._seconds[kind, wanted.may_be_sparse]
        shape = wanted.tokens, wanted.rows, wanted.columns

        def distance(other: tuple[int, int, int]) -> float:
            return sum(abs(math.log(have / want)) for have, want in zip(other, shape, strict=True))

        nearest = min(found, key=distance)
        return found[nearest] * wanted.flops / (2 * math.prod(nearest))


def read_measured(path: Path, gpu: str, precision: Precision) -> Measured:
    """The products of a file in one precision.

    Raises:
        UserError: if it cannot be read, holds something else, or was measured on another card or in another precision.
    """
    content = read_results(path, "gemm", gpu, precision)
    card, commit = content["machine"]["device"], content["machine"].get("commit")
    try:
        made = Measured(content["rows"], f"measured on {card} in {precision}: {path}, commit {commit}")
        for kind, sparse in product(_MEASURED, (False, True)):
            made.seconds(Product(kind, 1, 1, 1, sparse))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} has no dense and 2:4 products, forward and backward, that could be used") from error
    return made


def benchmark_of(path: Path) -> str:
    """Whose results a file holds; "" if it does not say.

    Raises:
        UserError: if it cannot be read.
    """
    content = _content(path)
    return str(content.get("benchmark", "")) if isinstance(content, dict) else ""


def _content(path: Path) -> Any:
    try:
        return json.loads(read_bounded(path, _LARGEST_FILE))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError):
        return None


def read_results(path: Path, benchmark: str, gpu: str, precision: Precision) -> dict[str, Any]:
    """The content of a file of results, with the rows of one precision: a file may hold several.

    Raises:
        UserError: if it is none, of another benchmark, or measured on another card or in another precision.
    """
    content = _content(path)
    good = isinstance(content, dict) and content.get("benchmark") == benchmark
    if not good or not isinstance(content.get("machine"), dict) or not isinstance(content.get("rows"), list):
        raise UserError(f'{path} is no file of results of "tools/benchmark.py {benchmark}"')
    card = str(content["machine"].get("device"))
    if kind_of(card) != gpu:
        raise UserError(f'{path} was measured on "{card}", which is no {gpu}; take --gpu of that card, or another file')
    # What could not be measured has no dtype.
    measured = [row for row in content["rows"] if isinstance(row, dict) and "dtype" in row]
    rows = [row for row in measured if row["dtype"] == _DTYPES[precision]]
    if not rows:
        others = ", ".join(sorted({str(row["dtype"]) for row in measured}))
        raise UserError(
            f"{path} has nothing that was measured in {_DTYPES[precision]}{others and f', but in {others}'}; "
            "the precision is that of --config, without one bf16"
        )
    return content | {"rows": rows}
