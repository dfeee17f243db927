"""Loading refuses numbers that no run can have saved, and no others, wherever in a long fragment they are.

Run: pytest tests/engine/test_loading.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slope_dist.engine import loading
from slope_dist.engine.loading import load_fragments
from slope_dist.errors import UserError
from slope_dist.parallel.fragments import Fragment, Kind, MemorySource, Rectangle, whole
from slope_dist.sparse import Pattern


def fragment(tensor: Tensor, kind: Kind) -> Fragment:
    return Fragment("layer.weight", kind, tuple(tensor.shape), whole(tuple(tensor.shape)), 0, tensor.numel(), tensor)


def loaded(values: list[float], dtype: torch.dtype, kind: Kind) -> list[float]:
    live = torch.zeros(len(values), dtype=dtype)
    source = MemorySource.take([fragment(torch.tensor(values, dtype=dtype), kind)], {})
    load_fragments(source, [fragment(live, kind)], {})
    return live.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_numbers_are_loaded_though_their_sum_is_none(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    values = [largest, largest, -0.0, 1.0]
    assert not torch.tensor(values, dtype=dtype).sum().isfinite()
    assert loaded(values, dtype, "weight") == values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["weight", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("bad", [[float("nan")], [float("inf")], [float("-inf"), float("inf")]])
def test_what_is_no_number_is_refused(dtype: torch.dtype, kind: Kind, bad: list[float]) -> None:
    with pytest.raises(UserError, match=f"NaN or infinity in {kind} layer.weight"):
        loaded([1.0, *bad, 2.0], dtype, kind)


def test_a_mean_of_squares_is_not_negative() -> None:
    assert loaded([0.0, -0.0, 3.0], torch.float32, "exp_avg_sq") == [0.0, 0.0, 3.0]
    with pytest.raises(UserError, match="negative mean of squares"):
        loaded([1.0, -1e-38], torch.float32, "exp_avg_sq")
    assert loaded([1.0, -1e-38], torch.float32, "exp_avg")[1] < 0


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 20])
def test_a_long_fragment_is_loaded_and_checked_in_chunks(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "CHUNK_BYTES", 32)
    values = [float(value) for value in range(1, length + 1)]
    assert loaded(values, torch.float32, "exp_avg_sq") == values
    with pytest.raises(UserError, match=r"NaN or infinity in exp_avg layer.weight"):
        loaded([*values, float("nan")], torch.float32, "exp_avg")
    with pytest.raises(UserError, match="negative mean of squares"):
        loaded([*values, -1.0], torch.float32, "exp_avg_sq")


def test_a_chunk_reads_no_more_than_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A range that begins inside its rectangle keeps its place."""
    monkeypatch.setattr(loading, "CHUNK_BYTES", 16)
    live = torch.zeros(11)
    piece = Fragment("layer.weight", "weight", (5, 4), whole((5, 4)), 3, 14, torch.arange(11.0))
    ranges = []

    class Watched(MemorySource):
        def read(self, name: str, kind: Kind, rectangle: Rectangle, start: int, stop: int) -> Tensor:
            ranges.append((start, stop))
            return super().read(name, kind, rectangle, start, stop)

    load_fragments(Watched.take([piece], {}), [replace(piece, tensor=live)], {})
    assert torch.equal(live, piece.tensor) and ranges == [(3, 7), (7, 11), (11, 14)]


@pytest.mark.parametrize("at", [0, 15, 16, 39])
def test_metadata_and_masks_are_compared_chunk_by_chunk(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "CHUNK_BYTES", 16)
    patterns = {"layer.indices": Pattern(2, 4)}

    def load(indices: Tensor, mask: Tensor) -> list[Tensor]:
        pieces = [
            Fragment(f"layer.{name}", "metadata", (40,), whole((40,)), 0, 40, tensor)
            for name, tensor in (("indices", indices), ("column_mask", mask))
        ]
        live = [replace(piece, tensor=torch.zeros_like(piece.tensor)) for piece in pieces]
        load_fragments(MemorySource.take(pieces, {}), live, patterns)
        return [piece.tensor for piece in live]

    # Entries 0 and 1 of each group of four, in either half of a byte.
    indices, mask = torch.full((40,), 0x44, dtype=torch.uint8), torch.full((40,), 0x31, dtype=torch.uint8)
    found = load(indices, mask)
    assert torch.equal(found[0], indices) and torch.equal(found[1], mask)
    bad = indices.clone()
    bad[at] = 0x45
    with pytest.raises(UserError, match=r"bad metadata for layer.indices"):
        load(bad, mask)
    bad = mask.clone()
    bad[at] = 0x35
    with pytest.raises(UserError, match=r"bad mask, layer.column_mask"):
        load(indices, bad)
