"""State held in memory is served by the ranges asked for, and never from a hole.

Run: pytest tests/parallel/test_fragments.py
"""

from __future__ import annotations

import pytest
import torch

from slope_dist.parallel.fragments import Fragment, MemorySource, rectangle_size, whole

SHAPE = (4, 6)
DATA = torch.arange(24.0)


def source(*ranges: tuple[int, int]) -> MemorySource:
    pieces = [Fragment("w", "weight", SHAPE, whole(SHAPE), a, b, DATA[a:b]) for a, b in ranges]
    return MemorySource.take(pieces, {"steps": 3})


def test_ranges_are_joined_in_any_order() -> None:
    held = source((16, 24), (0, 10), (10, 16))
    assert held.scalars == {"steps": 3}
    for start, stop in ((0, 24), (3, 5), (8, 20), (23, 24)):
        assert torch.equal(held.read("w", "weight", whole(SHAPE), start, stop), DATA[start:stop])


def test_one_piece_is_its_own_memory() -> None:
    held = source((0, 24))
    assert held.read("w", "weight", whole(SHAPE), 4, 8).data_ptr() == DATA[4:].data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_pieces_of_a_gpu_leave_it() -> None:
    made = DATA.cuda()
    held = MemorySource.take([Fragment("w", "weight", SHAPE, whole(SHAPE), 0, 24, made)], {})
    made.zero_()
    assert torch.equal(held.read("w", "weight", whole(SHAPE), 0, 24), DATA)


def test_holes_are_key_errors() -> None:
    held = source((0, 10), (12, 24))
    for start, stop in ((8, 14), (10, 11), (20, 25)):
        with pytest.raises(KeyError):
            held.read("w", "weight", whole(SHAPE), start, stop)
    for name, kind in (("v", "weight"), ("w", "master")):
        assert not held.has(name, kind)
        with pytest.raises(KeyError):
            held.read(name, kind, whole(SHAPE), 0, 4)
    with pytest.raises(KeyError):
        held.read("w", "weight", ((0, 2), (0, 6)), 0, 4)


def test_rectangles() -> None:
    assert whole(SHAPE) == ((0, 4), (0, 6))
    assert rectangle_size(((1, 3), (2, 6))) == 8
    assert Fragment("w", "weight", SHAPE, whole(SHAPE), 0, 24, DATA).key == ("w", "weight")
