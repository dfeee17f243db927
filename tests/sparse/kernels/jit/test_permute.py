"""The nibble kernel puts each 4-bit code where its source says, as a loop does, and writes nothing else.

Run: pytest tests/sparse/kernels/jit/test_permute.py
"""

from __future__ import annotations

import pytest
import torch

from slope_dist.sparse.kernels.jit.permute import permute_nibbles
from tests.sparse.kernels.devices import DEVICES

pytestmark = [pytest.mark.parametrize("device", DEVICES)]


def by_loop(packed: list[int], source: list[int]) -> list[int]:
    nibbles = [packed[place // 2] // 16 ** (place % 2) % 16 for place in source]
    return [low + 16 * high for low, high in zip(nibbles[::2], nibbles[1::2], strict=True)]


@pytest.mark.usefixtures("guarded_scratch")
@pytest.mark.parametrize("size", [1, 3, 512, 1300])
def test_equals_the_loop_and_is_undone_by_the_inverse(size: int, device: str) -> None:
    packed = torch.randint(256, (size,), dtype=torch.uint8)
    order = torch.randperm(2 * size)
    moved = permute_nibbles(packed.to(device), order.int().to(device))
    assert moved.tolist() == by_loop(packed.tolist(), order.tolist())
    back = permute_nibbles(moved, order.argsort().int().to(device))
    assert back.tolist() == packed.tolist()


@pytest.mark.usefixtures("guarded_scratch")
def test_a_nibble_may_be_wanted_twice_or_never(device: str) -> None:
    packed = torch.randint(256, (600,), dtype=torch.uint8)
    source = torch.randint(1200, (1200,), dtype=torch.int32)
    moved = permute_nibbles(packed.to(device), source.to(device))
    assert moved.tolist() == by_loop(packed.tolist(), source.tolist())


@pytest.mark.usefixtures("guarded_scratch")
@pytest.mark.parametrize(("size", "period"), [(600, 2), (600, 6), (600, 100), (600, 1200), (3000, 1200), (3000, 1500)])
def test_an_order_may_repeat(size: int, period: int, device: str) -> None:
    packed = torch.randint(256, (size,), dtype=torch.uint8)
    order = torch.randperm(period)
    whole = torch.cat([order + start for start in range(0, 2 * size, period)])
    moved = permute_nibbles(packed.to(device), order.int().to(device))
    assert moved.tolist() == by_loop(packed.tolist(), whole.tolist())


def test_what_does_not_belong_together_is_refused(device: str) -> None:
    packed, source = torch.zeros(8, dtype=torch.uint8, device=device), torch.zeros(16, dtype=torch.int32, device=device)
    for bad_packed, bad_source, message in (
        (packed.view(2, 4), source, r"must be uint8 \[N\]"),
        (packed.int(), source, r"must be uint8 \[N\]"),
        (packed, source[:7], r"a divisor of 16, not"),
        (packed, source.long(), r"a divisor of 16, not"),
        (packed, source.to("meta"), "sources on meta"),
        (packed, source.repeat(2)[::2], "must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            permute_nibbles(bad_packed, bad_source)
    assert permute_nibbles(packed[:0], source).shape == (0,)
