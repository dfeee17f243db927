"""Pieces of logical tensors: the language in which engines and checkpoints exchange state (design: checkpoint).

A logical tensor has a global name and shape. What a rank holds of it is a rectangle (its tensor-parallel shard) and, of
that rectangle in row-major order, a flat range [start, stop), which is what ZeRO owns. Nothing here says which layout
made the pieces, so state written by one layout can be read by another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Kind = Literal["weight", "metadata", "master", "exp_avg", "exp_avg_sq"]
"""weight: in the model's dtype; metadata: packed uint8; master: fp32 copy where the model's dtype is narrower; exp_avg
and exp_avg_sq: Adam's moments."""

Rectangle = tuple[tuple[int, int], ...]
"""Half-open global range of each dimension."""


def whole(shape: tuple[int, ...]) -> Rectangle:
    """The rectangle that is all of `shape`."""
    return tuple((0, size) for size in shape)


def rectangle_size(rectangle: Rectangle) -> int:
    """Number of elements in a rectangle."""
    return prod(stop - start for start, stop in rectangle)


@dataclass(frozen=True)
class Fragment:
    """One piece of one logical tensor, live in this process.

    Attributes:
        name: global name of the logical tensor.
        kind: which of its states this is.
        shape: global shape.
        rectangle: tensor shard of this rank.
        start: first element of the flat range within the rectangle.
        stop: one past its last element.
        tensor: the live memory, `stop - start` elements; reading and writing it is reading and writing the state.
        write: whether this rank is the one that saves the piece (False on replicas).
        derived: whether the engine makes it from another piece (a narrow weight from its fp32 master), so that it is
            saved for readers and never loaded.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    rectangle: Rectangle
    start: int
    stop: int
    tensor: Tensor
    write: bool = True
    derived: bool = False

    @property
    def key(self) -> tuple[str, Kind]:
        """What identifies the state this is a piece of."""
        return self.name, self.kind


class StateSource(Protocol):
    """Anything state can be loaded from: a checkpoint on disk, or an engine that is about to be released."""

    scalars: Mapping[str, Any]
    """What is not a tensor: optimizer step counters, loss scale, training progress."""

    def has(self, name: str, kind: Kind) -> bool:
        """Whether any piece of this state is there."""

    def read(self, name: str, kind: Kind, rectangle: Rectangle, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of `rectangle` in row-major order, 1-D, in the dtype they were stored in.

        Raises:
            KeyError: if some of them are not there.
        """


@dataclass
class MemorySource:
    """State in this rank's host memory: what crosses the adapter switch. Serves the ranges it was given."""

    scalars: Mapping[str, Any]
    pieces: dict[tuple[str, Kind], list[Fragment]] = field(default_factory=dict)

    @classmethod
    def take(cls, fragments: Iterable[Fragment], scalars: Mapping[str, Any]) -> MemorySource:
        """Hold the fragments' tensors: a GPU's are copied to the host, and leave it to the next engine.

        Those of a CPU are not copied, so the engine they came from must not step again.
        """
        source = cls(dict(scalars))
        for fragment in fragments:
            if fragment.derived:
                continue
            held = replace(fragment, tensor=fragment.tensor.detach().cpu())
            source.pieces.setdefault(fragment.key, []).append(held)
        return source

    def has(self, name: str, kind: Kind) -> bool:
        """Whether any piece of this state is held."""
        return (name, kind) in self.pieces

    def read(self, name: str, kind: Kind, rectangle: Rectangle, start: int, stop: int) -> Tensor:
        """See `StateSource.read`; the layout must be the one the pieces came from."""
        parts = []
        position = start
        for piece in sorted(self.pieces.get((name, kind), []), key=lambda piece: piece.start):
            if piece.rectangle == rectangle and piece.start <= position < piece.stop:
                end = min(stop, piece.stop)
                parts.append(piece.tensor.view(-1)[position - piece.start : end - piece.start])
                position = end
        if position != stop:
            raise KeyError(f"elements [{position}, {stop}) of {kind} {name} are not held here")
        if not parts:
            raise KeyError(f"an empty range of {kind} {name} was asked for")
        return torch.cat(parts) if len(parts) > 1 else parts[0]
