"""A compressed matrix as plain data: made from a dense one, cut, joined, expanded. No parameters, no placement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slope_dist.sparse import codec, pruning
from slope_dist.sparse.pattern import CUT_MULTIPLE, Pattern


def check_cut(position: int, size: int, what: str) -> None:
    """Refuse a cut that would split a group or a byte of metadata.

    Raises:
        ValueError: with the nearest good cuts.
    """
    if not 0 <= position <= size:
        raise ValueError(f"cut at {position} lies outside {what} of {size}")
    if position % CUT_MULTIPLE and position != size:
        low = position // CUT_MULTIPLE * CUT_MULTIPLE
        high = min(low + CUT_MULTIPLE, size)
        raise ValueError(
            f"cut at {position} of {size} {what} is not a multiple of {CUT_MULTIPLE}; the nearest good cuts are "
            f"{low} and {high}"
        )


@dataclass(frozen=True)
class CompressedMatrix:
    """values [O, K], indices uint8 [O, I / 8] and, where the second mask is state, column_mask uint8 [O, I / 8]."""

    values: Tensor
    indices: Tensor
    pattern: Pattern
    column_mask: Tensor | None = None

    @classmethod
    def prune(cls, dense: Tensor, pattern: Pattern) -> CompressedMatrix:
        """Magnitude-prune a dense [O, I] along its rows and compress it.

        Raises:
            ValueError: if I is no multiple of 8, a byte of metadata.
        """
        if dense.shape[1] % CUT_MULTIPLE:
            raise ValueError(f"{dense.shape[1]} columns are not a multiple of {CUT_MULTIPLE}")
        indices = codec.pack(pruning.row_mask(dense, pattern), pattern)
        return cls(codec.gather(dense, indices, pattern), indices, pattern)

    @classmethod
    def blank(cls, shape: tuple[int, int], pattern: Pattern, device: torch.device | str = "cpu") -> CompressedMatrix:
        """Zeros under the pattern that keeps each group's first n entries: a place to load a matrix [O, I] into."""
        rows, columns = shape
        if torch.device(device).type == "meta":
            indices = torch.zeros(rows, columns // 8, dtype=torch.uint8, device=device)
            return cls(torch.zeros(rows, pattern.kept(columns), device=device), indices, pattern)
        group = torch.arange(columns) % pattern.m < pattern.n
        row = codec.pack(group.view(1, columns), pattern)
        values = torch.zeros(rows, pattern.kept(columns), device=device)
        return cls(values, row.to(device).repeat(rows, 1), pattern)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the matrix it stands for."""
        return self.indices.shape[0], self.indices.shape[1] * 8

    def expand(self) -> Tensor:
        """The dense [O, I] with explicit zeros."""
        return codec.expand(self.values, self.indices, self.pattern)

    def cut(self, dim: int, start: int, stop: int) -> CompressedMatrix:
        """Rows (dim 0) or columns (dim 1) [start, stop) as a compressed matrix of its own, copied.

        Raises:
            ValueError: if a cut is off the multiples of rule R3; the message names the nearest good ones.
        """
        what = ("rows", "columns")[dim]
        if start > stop:
            raise ValueError(f"a cut from {start} to {stop} runs backwards")
        for position in (start, stop):
            check_cut(position, self.shape[dim], what)
        if dim == 0:
            return self._map(lambda part, per_row: part[start:stop])
        size = self.shape[1]
        return self._map(lambda part, per_row: part[:, start * per_row // size : stop * per_row // size])

    def shard(self, dim: int, rank: int, world_size: int) -> CompressedMatrix:
        """Part `rank` of `world_size` equal parts along `dim`.

        Raises:
            ValueError: if the parts are not equal or not cut on multiples of rule R3.
        """
        size = self.shape[dim]
        if size % world_size:
            raise ValueError(f"{size} {('rows', 'columns')[dim]} do not divide into {world_size} equal parts")
        part = size // world_size
        return self.cut(dim, rank * part, (rank + 1) * part)

    @classmethod
    def join(cls, parts: Sequence[CompressedMatrix], dim: int) -> CompressedMatrix:
        """Undo `shard`: the parts one after another along `dim`."""
        masks = [part.column_mask for part in parts if part.column_mask is not None]
        if masks and len(masks) != len(parts):
            raise ValueError("some parts hold a column mask and some do not")
        return cls(
            torch.cat([part.values for part in parts], dim=dim),
            torch.cat([part.indices for part in parts], dim=dim),
            parts[0].pattern,
            torch.cat(masks, dim=dim) if masks else None,
        )

    def doubly_pruned(self) -> Tensor:
        """W^{R,C} as a dense [O, I], by the held column mask or by magnitude."""
        kept = None if self.column_mask is None else codec.unpack_bits(self.column_mask)
        return pruning.doubly_pruned(self.values, self.indices, self.pattern, kept)

    def _map(self, take) -> CompressedMatrix:
        def part(tensor: Tensor) -> Tensor:
            return take(tensor, tensor.shape[1]).clone()

        mask = None if self.column_mask is None else part(self.column_mask)
        return CompressedMatrix(part(self.values), part(self.indices), self.pattern, mask)
