"""Claim: scratch tensors hold what is written into them, apart from each other, in a file without a name.

Run: pytest tests/training/test_scratch.py
"""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from slope_dist.training.scratch import Scratch, size_of
from tests.checkpoint.states import in_child
from tests.runs import same_bits

PLAN = {
    "odd": ((3, 5), torch.uint8),
    "narrow": ((7,), torch.bfloat16),
    "wide": ((2, 3, 4), torch.float32),
}


def test_tensors_hold_what_is_written(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, PLAN)
    assert list(tmp_path.iterdir()) == []
    written = {}
    for key, (shape, dtype) in PLAN.items():
        assert key in scratch and scratch[key].shape == shape and not scratch[key].any()
        written[key] = (100 * torch.rand(shape)).to(dtype)
        scratch[key].copy_(written[key])
        scratch.let_go()
    assert "other" not in scratch
    for key, tensor in written.items():
        assert same_bits(scratch[key], tensor), key


def test_tensors_outlive_what_made_them(tmp_path: Path) -> None:
    tensor = Scratch(tmp_path, PLAN)["wide"]
    tensor.fill_(3)
    assert tensor.sum() == 72


def resident() -> int:
    """Bytes of this process's memory that lie in files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {line.split(":")[0]: line.split() for line in lines}
    return sum(int(fields[name][1]) * 1024 for name in ("RssFile", "RssShmem"))


def test_pages_are_let_go(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here that tells how much memory is in use")
    size = 32 * 2**20
    scratch = Scratch(tmp_path, {"a": ((size,), torch.uint8)})
    before = resident()
    scratch["a"].fill_(7)
    assert resident() - before >= size // 2
    scratch.let_go()
    assert resident() - before <= size // 8
    assert bool((scratch["a"] == 7).all())


def test_no_room_is_an_error_before_anything_is_touched(tmp_path: Path) -> None:
    def body() -> None:
        limit = size_of(PLAN) - 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(OSError, match="File too large"):
            Scratch(tmp_path, PLAN)

    assert in_child(body) == 0
