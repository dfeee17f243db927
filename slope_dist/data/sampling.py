"""The order of samples: arithmetic on the seed, so that a run's place in its data is one integer, the step.

A split is cut into windows: window w covers tokens [w S, w S + S], S inputs and the same shifted by one as labels, so
that the last label of a window is the first input of the next. No token is an input twice in an epoch, and only the
tail that fills no window is left out. Each epoch visits all windows once, in an order that is a function of the seed
and the epoch; samples are numbered from 0 over all epochs. Which rank reads a sample changes nothing of this.
Of a mixture each corpus has its own order and its own epochs, and its part of the samples as blend.py says.

B batch, S sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch

from slope_dist.data.blend import Blend
from slope_dist.data.corpus import IGNORED_LABEL, Corpus
from slope_dist.errors import UserError

_ROUNDS = 8
_MOST_PLACES = 4096


def num_windows(num_tokens: int, sequence_length: int) -> int:
    """Windows of `sequence_length` inputs, each with one token more for its last label."""
    return max(0, (num_tokens - 1) // sequence_length)


class SampleOrder:
    """The window of every sample of a run: a new pseudo-random permutation of all windows each epoch.

    The permutation is a balanced Feistel network on the smallest domain of an even number of bits that holds all
    windows; a result outside them is put in again until it is inside. So one sample costs a few hashes, and nothing is
    stored.
    """

    def __init__(self, num_windows: int, seed: int, name: str = ""):
        """The order of `num_windows` windows that `seed` gives, and of corpora of a mixture their `name` too."""
        if num_windows < 1:
            raise ValueError(f"{num_windows} windows; an order needs at least 1")
        self.num_windows = num_windows
        self._source = f"sample order {seed}" + (f" of {name}" if name else "")
        self._half_bits = max(1, ((num_windows - 1).bit_length() + 1) // 2)

    def window(self, sample: int) -> int:
        """The window of sample `sample` (from 0)."""
        return int(self.windows(np.array([sample]))[0])

    def windows(self, samples: np.ndarray) -> np.ndarray:
        """The window of each sample: int64 [B] to int64 [B]."""
        epochs, places = np.divmod(np.asarray(samples, dtype=np.int64), self.num_windows)
        result = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            result[here] = self._permute(places[here], int(epoch))
        return result

    def _permute(self, places: np.ndarray, epoch: int) -> np.ndarray:
        keys = _round_keys(f"{self._source} {epoch}")
        values = self._feistel(places.astype(np.uint64), keys)
        outside = np.flatnonzero(values >= self.num_windows)
        while outside.size:
            values[outside] = self._feistel(values[outside], keys)
            outside = outside[values[outside] >= self.num_windows]
        return values.astype(np.int64)

    def _feistel(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        bits = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = values >> bits, values & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        return (left << bits) | right


@lru_cache(maxsize=256)
def _round_keys(source: str) -> np.ndarray:
    digest = hashlib.blake2b(source.encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of the splitmix64 generator: every input bit changes every output bit; uint64, wraps around."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def rank_positions(
    *, global_batch_size: int, micro_batch_size: int, data_ranks: int, data_rank: int, micro_index: int
) -> np.ndarray:
    """Positions in the global batch that a data rank reads for its micro-batch `micro_index` (from 0): int64 [B].

    They are consecutive, and micro-batch m of all ranks together comes before micro-batch m + 1.

    Raises:
        ValueError: the global batch is no multiple of micro-batch x ranks, or an index is out of range.
    """
    together = micro_batch_size * data_ranks
    if global_batch_size % together:
        raise ValueError(
            f"global batch of {global_batch_size} is not a multiple of micro-batch {micro_batch_size} x "
            f"{data_ranks} data ranks"
        )
    if not (0 <= data_rank < data_ranks and 0 <= micro_index < global_batch_size // together):
        raise ValueError(
            f"data rank {data_rank} of {data_ranks}, micro-batch {micro_index} of {global_batch_size // together}"
        )
    first = (micro_index * data_ranks + data_rank) * micro_batch_size
    return np.arange(first, first + micro_batch_size)


class TokenReader(Protocol):
    """What batches are read from; `Corpus` is one."""

    def tokens(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count): int64 [count]."""
        ...


class Part(NamedTuple):
    """A corpus of a mixture, or the only one.

    Attributes:
        corpus: one of its splits.
        weight: its part of the samples, in any unit.
        name: decides its order, with the seed; "" for the only one.
    """

    corpus: Corpus
    weight: Fraction = Fraction(1)
    name: str = ""


class Batch(NamedTuple):
    """Samples of a step.

    Attributes:
        tokens: inputs, int64 [B, S].
        labels: the tokens one further, int64 [B, S].
        samples: numbers of the samples over the whole run, from 0: int64 [B].
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    samples: torch.Tensor


class BatchReader:
    """Batches of the training split by step. It has no state: the step says all."""

    def __init__(self, parts: Sequence[Part], *, sequence_length: int, global_batch_size: int, seed: int):
        """Read samples of `sequence_length` tokens from the corpora of `parts`, in the order that `seed` gives.

        Raises:
            UserError: a corpus has fewer tokens than one sample needs.
        """
        # In order of name, so that it does not matter in which order they were listed.
        self.parts = sorted(parts, key=lambda part: part.name)
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self.blend = Blend([part.weight for part in self.parts])
        self.orders = [SampleOrder(windows_of(part.corpus, sequence_length), seed, part.name) for part in self.parts]
        # A place costs the same as many of an epoch, so these are worked out together.
        few = min(order.num_windows for order in self.orders)
        self._block = max(1, min(_MOST_PLACES, max(global_batch_size, few)))
        self._places = lru_cache(maxsize=4)(self._places_of)

    def batch(self, step: int, positions: Sequence[int] | np.ndarray) -> Batch:
        """The samples at `positions` (from 0) of the global batch of step `step` (from 1).

        Raises:
            ValueError: a step below 1 or a position outside the global batch.
            UserError: an id that is not below the vocabulary size, or a corpus that was changed meanwhile.
        """
        places = np.asarray(positions, dtype=np.int64)
        if step < 1 or ((places < 0) | (places >= self.global_batch_size)).any():
            raise ValueError(f"step {step}, positions {places} of a global batch of {self.global_batch_size}")
        samples = (step - 1) * self.global_batch_size + places
        read = []
        for sample in samples.tolist():
            block, place = divmod(sample, self._block)
            corpora, windows = self._places(block)
            read.append((self.parts[corpora[place]].corpus, int(windows[place])))
        for corpus in {corpus for corpus, _ in read}:
            corpus.check_unchanged()
        return Batch(*read_windows(read, self.sequence_length), torch.from_numpy(samples))

    def _places_of(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Corpus and window of each sample of a block."""
        corpora, numbers = self.blend.places(block * self._block + np.arange(self._block))
        windows = np.empty_like(numbers)
        for corpus, order in enumerate(self.orders):
            mine = corpora == corpus
            windows[mine] = order.windows(numbers[mine])
        return corpora, windows


def windows_of(corpus: Corpus, sequence_length: int) -> int:
    """Number of windows in a split.

    Raises:
        UserError: not even one.
    """
    windows = num_windows(corpus.num_tokens, sequence_length)
    if windows == 0:
        raise UserError(
            f"{corpus.path} has {corpus.num_tokens} tokens, fewer than one sample of {sequence_length} + 1 "
            "(model.sequence_length); give more text, or shorten the samples"
        )
    return windows


def read_windows(windows: Sequence[tuple[TokenReader, int]], sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels of windows, each given by where it is read and its number: B of them to int64 [B, S] twice."""
    # Two arrays, not views of one: whoever masks a label would spoil an input.
    tokens, labels = (np.empty((len(windows), sequence_length), dtype=np.int64) for _ in range(2))
    for row, (reader, window) in enumerate(windows):
        ids = reader.tokens(window * sequence_length, sequence_length + 1)
        tokens[row], labels[row] = ids[:-1], ids[1:]
    return torch.from_numpy(tokens), torch.from_numpy(labels)


def evaluation_batches(
    corpus: Corpus,
    *,
    sequence_length: int,
    micro_batch_size: int,
    data_ranks: int,
    data_rank: int,
    samples: int | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and labels, int64 [B, S] each, of one rank's part of the windows in order.

    All ranks yield equally many batches of equal shape, whatever the number of windows: rows that no window is left
    for repeat window 0 with all labels `IGNORED_LABEL`. So the windows that count are the same in every layout.

    Args:
        corpus: the validation split.
        sequence_length: inputs of a window.
        micro_batch_size: rows of each batch.
        data_ranks: ranks that share the windows.
        data_rank: this one.
        samples: use only so many windows, the first ones; None: all.

    Raises:
        UserError: the corpus has fewer tokens than one window needs, an id that is too large, or was changed since it
            was opened.
    """
    corpus.check_unchanged()
    total = windows_of(corpus, sequence_length)
    if samples is not None:
        total = min(total, samples)
    together = micro_batch_size * data_ranks
    for first in range(data_rank * micro_batch_size, -(-total // together) * together, together):
        windows = np.arange(first, first + micro_batch_size)
        real = windows < total
        tokens, labels = read_windows([(corpus, int(window)) for window in np.where(real, windows, 0)], sequence_length)
        labels[torch.from_numpy(~real)] = IGNORED_LABEL
        yield tokens, labels
