"""Claim: flat ranges of rectangles are cut, intersected and viewed exactly, and `check_tiling` takes a set of pieces
if and only if it holds every element once. The oracle is a count of elements in a plain tensor.

Run alone: python -m pytest tests/checkpoint/test_regions.py
"""

from __future__ import annotations

import itertools
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_dist.checkpoint.regions import boxes, check_tiling, flat_bounds, intersect, view_of_box
from slope_dist.parallel.fragments import Rectangle, rectangle_size, whole

from .states import part_of

Piece = tuple[Rectangle, int, int]


@st.composite
def rectangles(draw: st.DrawFn, shape: tuple[int, ...]) -> Rectangle:
    """A rectangle with at least one element inside `shape`."""
    sides = []
    for size in shape:
        low = draw(st.integers(0, size - 1))
        sides.append((low, draw(st.integers(low + 1, size))))
    return tuple(sides)


@st.composite
def flat_ranges(draw: st.DrawFn, rectangle: Rectangle) -> tuple[int, int]:
    start = draw(st.integers(0, rectangle_size(rectangle)))
    return start, draw(st.integers(start, rectangle_size(rectangle)))


def cuts(size: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Cut [0, size) into consecutive ranges."""
    inner = st.sets(st.integers(1, size - 1), max_size=3) if size > 1 else st.just(set())
    return inner.map(lambda at: list(itertools.pairwise(sorted({0, size} | at))))


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Piece]:
    """Pieces that tile `shape`: a grid of rectangles, each cut into flat ranges, in any order."""
    pieces: list[Piece] = []
    for rectangle in itertools.product(*(draw(cuts(size)) for size in shape)):
        pieces += [(rectangle, start, stop) for start, stop in draw(cuts(rectangle_size(rectangle)))]
    return draw(st.permutations(pieces))


shapes = st.lists(st.integers(1, 7), max_size=3).map(tuple)


def count(shape: tuple[int, ...], pieces: list[Piece]) -> torch.Tensor:
    """How many of the pieces hold each element of `shape`."""
    held = torch.zeros(prod(shape), dtype=torch.int64)
    positions = torch.arange(prod(shape)).view(shape)
    for rectangle, start, stop in pieces:
        held[part_of(positions, rectangle, start, stop)] += 1
    return held


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_boxes_hold_the_range_in_order(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    rectangle = data.draw(rectangles(shape))
    start, stop = data.draw(flat_ranges(rectangle))
    positions = torch.arange(prod(shape)).view(shape)
    cut = list(boxes(rectangle, start, stop))
    assert len(cut) <= max(1, 2 * len(shape) - 1)
    parts = [part_of(positions, box, 0, rectangle_size(box)) for box in cut]
    found = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    assert torch.equal(found, part_of(positions, rectangle, start, stop))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_box_is_viewed_in_its_range(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    rectangle = data.draw(rectangles(shape))
    box = intersect(rectangle, data.draw(rectangles(shape)))
    if box is None:
        return
    positions = torch.arange(prod(shape)).view(shape)
    first, last = flat_bounds(rectangle, box)
    flat = torch.cat([torch.tensor([-1, -1]), part_of(positions, rectangle, first, last)])[2:]
    view = view_of_box(flat, first, rectangle, box)
    assert torch.equal(view.reshape(-1), part_of(positions, box, 0, rectangle_size(box)))


def test_a_view_never_reaches_past_its_elements() -> None:
    flat = torch.arange(10)[2:5]
    with pytest.raises(ValueError, match="not inside"):
        view_of_box(flat, 0, whole((10,)), ((0, 4),))
    with pytest.raises(ValueError, match="not inside"):
        view_of_box(flat, 1, whole((10,)), ((0, 2),))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_layout_tiles(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    check_tiling(shape, data.draw(layouts(shape)))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_spoilt_layout_is_refused(data: st.DataObject) -> None:
    """One piece dropped, doubled, shifted, or one more added: refused unless it still holds every element once."""
    shape = data.draw(shapes)
    pieces = data.draw(layouts(shape))
    at = data.draw(st.integers(0, len(pieces) - 1))
    rectangle, _, _ = pieces[at]
    change = data.draw(st.sampled_from(["drop", "double", "shift", "add"]))
    if change == "drop":
        del pieces[at]
    elif change == "double":
        pieces.append(pieces[at])
    elif change == "shift":
        start = data.draw(st.integers(0, rectangle_size(rectangle) - 1))
        pieces[at] = (rectangle, start, data.draw(st.integers(start + 1, rectangle_size(rectangle))))
    else:
        extra = data.draw(rectangles(shape))
        pieces.append((extra, 0, rectangle_size(extra)))
    if bool((count(shape, pieces) == 1).all()):
        check_tiling(shape, pieces)
    else:
        with pytest.raises(ValueError, match=r"missing|twice|overlap|not a range"):
            check_tiling(shape, pieces)


@pytest.mark.parametrize(
    ("rectangle", "start", "stop", "message"),
    [
        (((0, 9),), 0, 9, "does not lie inside"),
        (((4, 4),), 0, 0, "does not lie inside"),
        (((0, 8), (0, 1)), 0, 8, "does not lie inside"),
        (((0, 8),), 0, 9, "not a range"),
        (((0, 8),), 3, 3, "not a range"),
    ],
)
def test_pieces_outside_the_tensor_are_refused(rectangle: Rectangle, start: int, stop: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tiling((8,), [(rectangle, start, stop)])


def test_ten_thousand_shards_are_checked_at_once() -> None:
    """A sweep, not all pairs: 10,000 columns or rows take 10,000 looks, where all pairs would take 50 million."""
    size = 10_000
    check_tiling((2, size), [(((0, 2), (at, at + 1)), 0, 2) for at in range(size)])
    check_tiling((size, 2), [(((at, at + 1), (0, 2)), 0, 2) for at in range(size)])
