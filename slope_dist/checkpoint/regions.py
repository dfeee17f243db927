"""Arithmetic of rectangles and of flat ranges of rectangles, in any number of dimensions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from math import prod

from torch import Tensor

from slope_dist.parallel.fragments import Rectangle, rectangle_size


def describe(rectangle: Rectangle) -> str:
    """The rectangle as a reader of an error knows it: "[0:4, 8:16]"."""
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in rectangle) + "]"


def intersect(first: Rectangle, second: Rectangle) -> Rectangle | None:
    """What both hold, None where they share no element. The two have the same number of dimensions."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(first, second, strict=True))
    return common if all(start < stop for start, stop in common) else None


def boxes(rectangle: Rectangle, start: int, stop: int) -> Iterator[Rectangle]:
    """Cut elements [start, stop) of `rectangle` in row-major order into rectangles: at most 2 D - 1 in D dimensions."""
    if start >= stop:
        return
    if not rectangle:
        yield ()
        return
    (low, _), rest = rectangle[0], rectangle[1:]
    row_size = rectangle_size(rest)
    first, head = divmod(start, row_size)
    last, tail = divmod(stop, row_size)
    if head:
        head_stop = tail if first == last else row_size
        yield from (((low + first, low + first + 1), *box) for box in boxes(rest, head, head_stop))
        first += 1
    if first < last:
        yield ((low + first, low + last), *rest)
    if tail and first <= last:
        yield from (((low + last, low + last + 1), *box) for box in boxes(rest, 0, tail))


def flat_bounds(rectangle: Rectangle, box: Rectangle) -> tuple[int, int]:
    """Row-major position within `rectangle` of the first element of `box`, and one past that of its last."""
    strides = _strides(rectangle)
    corner = [start for start, _ in rectangle]
    first = sum((low - at) * stride for (low, _), at, stride in zip(box, corner, strides, strict=True))
    last = sum((high - 1 - at) * stride for (_, high), at, stride in zip(box, corner, strides, strict=True))
    return first, last + 1


def view_of_box(flat: Tensor, first: int, rectangle: Rectangle, box: Rectangle) -> Tensor:
    """View of `box` in a part of a rectangle.

    Args:
        flat: contiguous, 1-D: the elements of `rectangle` from position `first` on, all those of `box` among them.
        first: row-major position within `rectangle` of the first element of `flat`.
        rectangle: what `flat` is a range of.
        box: a rectangle inside `rectangle`.

    Returns:
        A view in the shape of `box`.

    Raises:
        ValueError: if `flat` does not hold all of `box`; `as_strided` would reach past it.
    """
    low, high = flat_bounds(rectangle, box)
    if low < first or high > first + flat.numel():
        raise ValueError(f"{describe(box)} is not inside the given elements of {describe(rectangle)}")
    sizes = [stop - start for start, stop in box]
    return flat.as_strided(sizes, _strides(rectangle), flat.storage_offset() + low - first)


def check_tiling(shape: tuple[int, ...], ranges: Iterable[tuple[Rectangle, int, int]]) -> None:
    """Refuse pieces that do not hold every element of a tensor exactly once.

    The flat ranges of each rectangle must tile it, and the rectangles must tile the tensor.

    Args:
        shape: of the tensor.
        ranges: (rectangle, start, stop) of each piece.

    Raises:
        ValueError: naming a hole, an overlap or a piece outside the tensor.
    """
    of_rectangle: dict[Rectangle, list[tuple[int, int]]] = {}
    for rectangle, start, stop in ranges:
        of_rectangle.setdefault(rectangle, []).append((start, stop))
    for rectangle, parts in of_rectangle.items():
        if len(rectangle) != len(shape) or not all(
            0 <= low < high <= size for (low, high), size in zip(rectangle, shape, strict=True)
        ):
            raise ValueError(f"the rectangle {describe(rectangle)} does not lie inside the shape {list(shape)}")
        position, size = 0, rectangle_size(rectangle)
        for start, stop in sorted(parts):
            if start >= stop or stop > size:
                raise ValueError(f"[{start}, {stop}) is not a range of the {size} elements of {describe(rectangle)}")
            if start != position:
                low, high, what = (position, start, "missing") if start > position else (start, position, "held twice")
                raise ValueError(f"elements [{low}, {high}) of {describe(rectangle)} are {what}")
            position = stop
        if position != size:
            raise ValueError(f"elements [{position}, {size}) of {describe(rectangle)} are missing")
    overlap = _overlap(of_rectangle)
    if overlap is not None:
        raise ValueError(f"the rectangles {describe(overlap[0])} and {describe(overlap[1])} overlap")
    held = sum(map(rectangle_size, of_rectangle))
    if held != prod(shape):
        raise ValueError(f"{prod(shape) - held} of the {prod(shape)} elements of {list(shape)} are missing")


def _strides(rectangle: Rectangle) -> list[int]:
    return [rectangle_size(rectangle[dim + 1 :]) for dim in range(len(rectangle))]


def _overlap(rectangles: Collection[Rectangle]) -> tuple[Rectangle, Rectangle] | None:
    """Two of the distinct rectangles that share an element, if there are."""
    num_dims = len(next(iter(rectangles), ()))
    if num_dims == 0:
        return None
    # Sweeping along the dimension with the most cuts keeps few rectangles open at a time: near linear for shards.
    axis = max(range(num_dims), key=lambda dim: len({rectangle[dim] for rectangle in rectangles}))
    still_open: list[Rectangle] = []
    for rectangle in sorted(rectangles, key=lambda rectangle: rectangle[axis]):
        still_open = [other for other in still_open if other[axis][1] > rectangle[axis][0]]
        for other in still_open:
            if intersect(other, rectangle) is not None:
                return other, rectangle
        still_open.append(rectangle)
    return None
