"""A vendor library of plain torch, to see what a dispatcher asks of one; it refuses what a contract would refuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slope_dist.sparse import codec
from slope_dist.sparse.kernels import Problem, Vendors
from slope_dist.sparse.kernels.metadata import MetadataLayout
from slope_dist.sparse.kernels.primitives import TWO_FOUR
from slope_dist.sparse.kernels.vendor import VendorError


@dataclass(frozen=True)
class PlainAlgorithm:
    """`kind` is "right", "wrong", "nan", "failing", "choosy" (fails for fewer than 16 tokens), "unsteady" (right, with
    other bits each time), "late" (with other bits the fifth time), or "without bias", "without addend", "without lone
    bias" or "without lone addend", which it leaves out, lone ones only where the other is not given."""

    kind: str
    deterministic: bool = True

    def __str__(self) -> str:
        return self.kind if self.deterministic else f"{self.kind} in any order"


@dataclass
class PlainVendor:
    """Metadata is ours backwards: a nibble permutation that nothing else makes by chance.

    Attributes:
        kinds: its algorithms.
        least_rows: weights of fewer are refused.
        seen: of each product, the form in which its metadata came: "none", "kept" or "in place".
        times: how often each algorithm has computed one.
    """

    kinds: tuple[PlainAlgorithm, ...] = (PlainAlgorithm("right"),)
    least_rows: int = 0
    name: str = "plain"
    version: str = "1"
    standing: str = "a stand-in"
    seen: list[str] = field(default_factory=list)
    times: Counter[PlainAlgorithm] = field(default_factory=Counter)
    findings: dict[str, bool] = field(default_factory=dict)

    def unsupported(self, problem: Problem) -> str | None:
        return f"fewer than {self.least_rows} rows" if problem.rows < self.least_rows else None

    def metadata_layout(self, rows: int, columns: int, dtype: torch.dtype) -> MetadataLayout:
        return MetadataLayout(torch.arange(rows * columns // 4, dtype=torch.int32).flip(0))

    def algorithms(self, problem: Problem) -> tuple[PlainAlgorithm, ...]:
        return self.kinds

    def product(
        self,
        x: Tensor,
        values: Tensor,
        indices: Tensor,
        metadata: Tensor | None,
        algorithm: PlainAlgorithm,
        *,
        bias: Tensor | None = None,
        addend: Tensor | None = None,
    ) -> Tensor:
        if algorithm.kind == "failing":
            raise VendorError("plain refuses: not supported")
        if algorithm.kind == "choosy" and len(x) < 16:
            raise VendorError(f"plain refuses: {len(x)} tokens")
        layout = self.metadata_layout(values.shape[0], values.shape[1] * 2, values.dtype)
        if metadata is None:
            self.seen.append("none")
            metadata = layout.vendor(indices)
        else:
            adjacent = metadata.data_ptr() == values.data_ptr() + values.nbytes
            self.seen.append("in place" if adjacent else "kept")
        dense = codec.expand(values, layout.ours(metadata, (values.shape[0], values.shape[1] * 2)), TWO_FOUR)
        y = x @ dense.t()
        if algorithm.kind == "wrong":
            y[0, 0] += y.norm()
        if algorithm.kind == "unsteady":
            y = y.nextafter(y + (-1) ** len(self.seen))
        self.times[algorithm] += 1
        if algorithm.kind == "late" and self.times[algorithm] == 5:
            y = y.nextafter(y + 1)
        if algorithm.kind == "nan":
            y[-1, -1] = torch.nan
        lone = "" if bias is not None and addend is not None else "lone "
        y = y if addend is None or algorithm.kind in ("without addend", f"without {lone}addend") else y + addend
        return y if bias is None or algorithm.kind in ("without bias", f"without {lone}bias") else y + bias


def vendors(*routes: PlainVendor) -> Vendors:
    return Vendors(routes)  # type: ignore[arg-type]


def preferring(*wanted: str) -> Callable[[Mapping[str, object], torch.device, bool], dict[str, float]]:
    """A timer for which candidates are the faster the earlier one of `wanted` occurs in their name; dense takes 1 s."""

    def seconds(label: str) -> float:
        ranks = [i for i, text in enumerate(wanted) if text in label]
        return 0.5 + 0.01 * ranks[0] if ranks else 2.0

    def timer(calls: Mapping[str, object], device: torch.device, cold: bool) -> dict[str, float]:
        return {label: 1.0 if label == "dense" else seconds(label) for label in calls}

    return timer
