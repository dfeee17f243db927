"""What a model keeps between the parts of a sequence: the keys and values of the tokens it has seen.

Shape letters: B batch, S sequence (of the new part), L all tokens so far, D head size, N query heads, G key and value
heads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class BlockCache:
    """Keys and values of one block: [B, G, capacity, D] each, of which the first are filled: those seen so far."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor, seen: int, capacity: int) -> tuple[Tensor, Tensor]:
        """Append [B, G, S, D] twice behind the first `seen`; returns all: [B, G, L, D] twice."""
        if self.keys is None or self.values is None:
            shape = (*k.shape[:2], capacity, k.shape[3])
            self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
        stop = seen + k.shape[2]
        self.keys[:, :, seen:stop] = k
        self.values[:, :, seen:stop] = v
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def keep(self, rows: Tensor) -> None:
        """Go on with these sequences alone: int64 [b]."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]


class Decoding:
    """Sequences that are fed part by part, and what was kept of the parts before.

    Shorter sequences of a batch begin with padding, which no token sees; a sequence's first token that is none has
    position 0.

    Args:
        padding: tokens of padding before each sequence, int64 [B].
        capacity: most tokens that a sequence may grow to, padding included.
    """

    def __init__(self, padding: Tensor, capacity: int) -> None:
        self.padding = padding
        self.capacity = capacity
        self.seen = 0
        # Asked of the device once, not for every token.
        self._is_padded = bool(padding.any())
        self._blocks: list[BlockCache] = []

    @property
    def tensors(self) -> list[Tensor]:
        """The keys and values of every block, [B, G, capacity, D] each, as far as there are any."""
        return [t for block in self._blocks for t in (block.keys, block.values) if t is not None]

    @property
    def bytes(self) -> int:
        """Memory of the keys and values."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def part(self, length: int, blocks: int) -> Iterator[Part]:
        """The next part, of `length` tokens, for each of the model's `blocks`; afterwards they count as seen.

        Raises:
            ValueError: if the sequences would outgrow the capacity.
        """
        if self.seen + length > self.capacity:
            raise ValueError(f"{self.seen + length} tokens do not fit into a cache of {self.capacity}")
        while len(self._blocks) < blocks:
            self._blocks.append(BlockCache())
        positions, visible = self.positions(length), self._visible(length)
        stacked: dict[int, Tensor] = {}
        for block in self._blocks:
            yield Part(positions, visible, stacked, block, self.seen, self.capacity)
        self.seen += length

    def keep(self, rows: Tensor) -> None:
        """Go on with these sequences of the batch alone, in this order: int64 [b]."""
        self.padding = self.padding[rows]
        for block in self._blocks:
            block.keep(rows)

    def positions(self, length: int) -> Tensor:
        """Positions of the next `length` tokens: int64 [B, S]; 0 for padding."""
        at = torch.arange(self.seen, self.seen + length, device=self.padding.device)
        return (at.unsqueeze(0) - self.padding.unsqueeze(1)).clamp(min=0)

    def _visible(self, length: int) -> Tensor | None:
        """Which of all tokens each new one sees: bool [B, 1, S, L]; None: all up to itself, and none has come, or it is
        the only new one, so that no mask is needed to say so."""
        if not self._is_padded and (self.seen == 0 or length == 1):
            return None
        query = torch.arange(self.seen, self.seen + length, device=self.padding.device).view(1, -1, 1)
        key = torch.arange(self.seen + length, device=self.padding.device).view(1, 1, -1)
        # Padding sees itself: a softmax over nothing would be NaN, which then spreads through the values.
        visible = (key <= query) & ((key >= self.padding.view(-1, 1, 1)) | (key == query))
        return visible.unsqueeze(1)


class Part:
    """One part of the sequences as one block sees it.

    Attributes:
        positions: int64 [B, S] of the new tokens.
        visible: which of all tokens each new one sees, bool [B, 1, S, L]; None: all up to itself, and the new tokens
            are the first, or one.
        capacity: most tokens of a sequence.
    """

    def __init__(
        self,
        positions: Tensor,
        visible: Tensor | None,
        stacked: dict[int, Tensor],
        block: BlockCache,
        seen: int,
        capacity: int,
    ) -> None:
        self.positions = positions
        self.visible = visible
        self._stacked = stacked
        self._block = block
        self._seen = seen
        self.capacity = capacity

    def visible_to(self, heads: int) -> Tensor:
        """`visible` for the queries of so many heads, one head after another: bool [B, 1, heads S, L]."""
        assert self.visible is not None
        if heads == 1:
            return self.visible
        if heads not in self._stacked:
            # Once for all blocks.
            self._stacked[heads] = self.visible.repeat(1, 1, heads, 1)
        return self._stacked[heads]

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the new tokens, [B, G, S, D] twice -> those of all, [B, G, L, D] twice."""
        return self._block.extend(k, v, self._seen, self.capacity)
