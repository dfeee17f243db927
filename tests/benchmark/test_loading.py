"""`tools/benchmark.py loader` times two readers that give batches, and tells one that does not.

Run: pytest tests/benchmark/test_loading.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from slope_dist.benchmark import loading
from slope_dist.benchmark.timing import WrongResultError
from tests.benchmark.test_benchmark_tool import benchmark


def test_both_readers_are_reported(tmp_path: Path) -> None:
    file = tmp_path / "loader.json"
    done = benchmark(
        *("loader", "--samples", "300", "--length", "64", "--batch", "3", "--seconds", "0", "--output", str(file)),
        *("--folder", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr
    assert "batches of 3 x 64 tokens" in done.stdout.replace("\n", "")
    (row,) = json.loads(file.read_text())["rows"]
    assert set(row["rivals"]) == set(loading.RIVALS)
    for rival in row["rivals"].values():
        assert rival["tokens_per_second"] > 0 and rival["rounds"] >= 5 and "grown_bytes" in rival
    assert list(tmp_path.iterdir()) == [file]


def test_a_wrong_reader_is_not_timed() -> None:
    size = loading.Size(samples=200, sequence_length=4, batch_size=2)
    tokens = torch.arange(8).reshape(2, 4)
    loading.check("right", lambda number: (tokens, tokens + 1), size)
    for wrong in (lambda number: (tokens, tokens), lambda number: (tokens[:1], tokens[:1] + 1)):
        with pytest.raises(WrongResultError, match="wrong, batch 0"):
            loading.check("wrong", wrong, size)
