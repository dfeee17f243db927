"""The measured peak is what a piece of work takes at its worst, not what it leaves, nor what was there before.

Run: pytest tests/benchmark/test_memory.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from slope_dist.benchmark import layer, memory

CPU = torch.device("cpu")
MIB = 2**20

pytestmark = pytest.mark.skipif(not memory.can_measure(CPU), reason="this system does not tell a process its peak")


def test_the_peak_is_what_was_held_at_the_worst_moment() -> None:
    def prepare() -> Callable[[], None]:
        kept_before = torch.ones(192 * MIB, dtype=torch.uint8)
        freed_before = torch.ones(192 * MIB, dtype=torch.uint8)
        del freed_before

        def work() -> None:
            # 128 + 64 at once, then 64: never the 256 of all three.
            first = kept_before[: 128 * MIB].clone()
            second = first[: 64 * MIB].clone()
            del first
            second.clone()

        return work

    # Above it some MiB of library code, paged in at its first use.
    assert 191 < memory.peak_of(prepare, CPU) / MIB < 230


def test_anonymous_memory_is_that_of_no_file(tmp_path: Path) -> None:
    file = tmp_path / "mapped"
    file.write_bytes(bytes(64 * MIB))
    before = memory.anonymous_bytes()
    with memory.AnonymousPeak() as peak:
        mapped = torch.from_file(str(file), size=64 * MIB, dtype=torch.uint8, shared=False)
        assert int(mapped.max()) == 0
        held = torch.ones(64 * MIB, dtype=torch.uint8)
        more = held.clone()
        time.sleep(0.1)
        del more
    assert 127 < (peak.bytes - before) / MIB < 150
    assert 63 < (memory.anonymous_bytes() - before) / MIB < 80
    assert len(held) + len(mapped) == 128 * MIB


def test_a_step_of_a_layer_takes_at_least_its_results() -> None:
    case = layer.Case(tokens=2048, in_features=512, out_features=512, dtype=torch.float32, device=CPU)
    # Output and input gradient, 4 MiB each, and the weight gradient, 1 MiB dense and half of it sparse.
    assert layer.peak_bytes(case, layer.DENSE) > 9 * MIB
    assert layer.peak_bytes(case, layer.DERIVED) > 8.5 * MIB


def test_a_failing_child_is_noticed(capfd: pytest.CaptureFixture[str]) -> None:
    def prepare() -> Callable[[], None]:
        raise ValueError("no such layer")

    with pytest.raises(RuntimeError, match="ended with code 1"):
        memory.peak_of(prepare, CPU)
    assert "no such layer" in capfd.readouterr().err
