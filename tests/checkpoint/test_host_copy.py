"""A rank holds the bytes of what it writes once more in host memory, and hardly more where that is pinned.

Run: pytest tests/checkpoint/test_host_copy.py
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from slope_dist.checkpoint.host_copy import HostCopy, PinnedBlocks
from slope_dist.parallel.fragments import Fragment, whole

MI = 2**20


def not_pinned(size: int) -> Tensor:
    """What a CPU has instead; torch rounds pinned sizes up to powers of two, so others must not be asked for."""
    assert size & (size - 1) == 0
    return torch.empty(size, dtype=torch.uint8)


def state(sizes: list[int]) -> list[Fragment]:
    """Fragments of so many elements, by turns fp32, bf16 and uint8."""
    dtypes = (torch.float32, torch.bfloat16, torch.uint8)
    made = []
    for number, size in enumerate(sizes):
        tensor = torch.randint(0, 100, (size,)).to(dtypes[number % 3])
        made.append(Fragment(f"{number}", "weight", (size,), whole((size,)), 0, size, tensor))
    return made


def test_the_copys_memory_is_that_of_what_is_written_and_serves_again() -> None:
    copy = HostCopy()
    big, other = torch.zeros(1000), torch.ones(10, dtype=torch.bfloat16)
    fragments = [
        Fragment("a", "weight", (1000,), whole((1000,)), 0, 1000, big),
        Fragment("b", "weight", (10,), whole((10,)), 0, 10, other),
        Fragment("c", "weight", (10,), whole((10,)), 0, 10, other, write=False),
    ]
    first = copy.take(fragments)
    assert copy.bytes == 4000 + 20
    assert [fragment.name for fragment in first] == ["a", "b"]
    again = copy.take(fragments)
    assert [f.tensor.data_ptr() for f in again] == [f.tensor.data_ptr() for f in first]
    copy.take(fragments[1:])
    assert copy.bytes == 20, "what is not saved any more is let go"


def test_buffers_that_are_cut_hold_what_they_were_given() -> None:
    draw = random.Random(5)
    fragments = state([draw.choice((1, 7, 300, 5000, MI + 3)) for _ in range(60)])
    copy = HostCopy(not_pinned)
    first = copy.take(fragments)
    assert all(torch.equal(f.tensor, made.tensor) for f, made in zip(first, fragments, strict=True))
    held = copy.bytes
    for fragment in fragments:
        fragment.tensor.add_(1)
    again = copy.take(fragments)
    assert all(torch.equal(f.tensor, made.tensor) for f, made in zip(again, fragments, strict=True))
    assert copy.bytes == held and [f.tensor.data_ptr() for f in again] == [f.tensor.data_ptr() for f in first]


def test_what_is_not_saved_any_more_leaves_no_gaps_for_long() -> None:
    copy = HostCopy(not_pinned)
    copy.take(state([4 * MI] * 3))
    few = state([MI])
    copy.take(few)
    assert copy.bytes >= 4 * MI
    [taken] = copy.take(few)
    assert copy.bytes == 4 * MI and torch.equal(taken.tensor, few[0].tensor)


def test_a_copy_that_fails_is_empty() -> None:
    def no_room(size: int) -> Tensor:
        if size > 2 * MI:
            raise RuntimeError("no room")
        return not_pinned(size)

    copy = HostCopy(no_room)
    with pytest.raises(RuntimeError, match="no room"):
        copy.take(state([100, 4 * MI]))
    assert copy.bytes == 0


@pytest.mark.parametrize("data_ranks", [1, 3, 8])
@pytest.mark.parametrize(("hidden", "ffn", "tensor"), [(9216, 36864, 4), (5120, 20480, 2), (4096, 14336, 2)])
def test_blocks_are_filled(hidden: int, ffn: int, tensor: int, data_ranks: int) -> None:
    # A block's matrices at 2:4, of which each data rank holds parts, as fp32 master and moments, and bf16 weight.
    matrices = [hidden * hidden // 2 // tensor] * 4 + [hidden * ffn // 2 // tensor] * 2 + [hidden] * 6
    blocks = PinnedBlocks(lambda size: torch.empty(size, dtype=torch.uint8, device="meta"))
    needed = 0
    for elements in matrices * 8:
        for dtype in (torch.bfloat16, torch.float32, torch.float32, torch.float32):
            needed += blocks.cut(-(-elements // data_ranks), dtype).nbytes
    assert needed <= blocks.bytes < 1.25 * needed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_state_is_copied_to_pinned_memory() -> None:
    fragments = [
        Fragment(f.name, f.kind, f.shape, f.rectangle, f.start, f.stop, f.tensor.cuda()) for f in state([5000, 3, MI])
    ]
    copies = HostCopy().take(fragments)
    for made, fragment in zip(copies, fragments, strict=True):
        assert made.tensor.is_pinned() and torch.equal(made.tensor, fragment.tensor.cpu())
