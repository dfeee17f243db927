"""Claim: every window is read once an epoch, in an order that only seed and epoch decide, whatever the layout.

Not tested here: reading from real files (test_corpus.py).

    python -m pytest tests/data/test_sampling.py
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_dist.data.blend import Blend
from slope_dist.data.sampling import (
    IGNORED_LABEL,
    BatchReader,
    Part,
    SampleOrder,
    evaluation_batches,
    num_windows,
    rank_positions,
    read_windows,
)
from slope_dist.errors import UserError

SEEDS = st.integers(min_value=0, max_value=2**63 - 1)


GOLDEN_10 = [5, 2, 7, 9, 0, 1, 4, 8, 6, 3, 1, 3, 9, 0, 4, 7, 2, 5, 6, 8]
GOLDEN_LARGE = [48005319, 685565531, 328509507, 936108723]


class Counting:
    """A corpus whose token at position p is p."""

    path = Path("counting.bin")

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens

    def tokens(self, start: int, count: int) -> np.ndarray:
        assert start >= 0 and start + count <= self.num_tokens
        return np.arange(start, start + count, dtype=np.int64)

    def check_unchanged(self) -> None:
        pass


def counting(num_tokens: int) -> Any:
    return Counting(num_tokens)


def parts(num_tokens: int) -> list[Part]:
    return [Part(counting(num_tokens))]


@settings(deadline=None, max_examples=150)
@given(windows=st.integers(1, 5000), seed=SEEDS, epoch=st.integers(0, 2**40))
def test_every_window_once_per_epoch(windows, seed, epoch):
    order = SampleOrder(windows, seed)
    visited = order.windows(epoch * windows + np.arange(windows))
    assert np.array_equal(np.sort(visited), np.arange(windows))


@pytest.mark.parametrize("windows", [1, 2, 3, 4, 5, 16, 17, 64, 65, 255, 256, 257])
def test_small_and_power_of_two_sizes(windows):
    visited = SampleOrder(windows, 7).windows(np.arange(3 * windows)).reshape(3, windows)
    assert np.array_equal(np.sort(visited, axis=1), np.tile(np.arange(windows), (3, 1)))


@settings(deadline=None, max_examples=50)
@given(windows=st.integers(1, 10**12), seed=SEEDS, sample=st.integers(0, 10**15))
def test_one_sample_alone_equals_it_in_company(windows, seed, sample):
    order = SampleOrder(windows, seed)
    window = order.window(sample)
    assert 0 <= window < windows
    crowd = sample + np.arange(-min(sample, 3), 4)
    assert order.windows(crowd)[min(sample, 3)] == window


def test_order_differs_between_epochs_and_seeds_and_is_not_the_identity():
    first = SampleOrder(1000, 1).windows(np.arange(2000)).reshape(2, 1000)
    other = SampleOrder(1000, 2).windows(np.arange(1000))
    for one, two in [(first[0], first[1]), (first[0], other), (first[0], np.arange(1000))]:
        # Two independent permutations agree in 1 place on average; 12 or more has probability 1e-9.
        assert (one == two).sum() < 12


def test_the_order_is_fixed_for_ever():
    """A resumed run relies on it: changing the arithmetic is a change of format."""
    assert SampleOrder(10, 0).windows(np.arange(20)).tolist() == GOLDEN_10
    assert SampleOrder(10**9, 1234).windows(np.array([0, 1, 10**9, 10**15])).tolist() == GOLDEN_LARGE


def test_first_window_is_uniform_over_epochs():
    windows, epochs = 50, 10_000
    order = SampleOrder(windows, 3)
    counts = np.bincount(order.windows(np.arange(epochs) * windows), minlength=windows)
    chi_square = ((counts - epochs / windows) ** 2 / (epochs / windows)).sum()
    # 49 degrees of freedom: mean 49, standard deviation 9.9. Deterministic, so it passes for ever or never.
    assert chi_square < 49 + 5 * 9.9


@settings(deadline=None, max_examples=100)
@given(micro=st.integers(1, 8), ranks=st.integers(1, 8), steps=st.integers(1, 8))
def test_every_position_is_read_by_one_rank_once(micro, ranks, steps):
    total = micro * ranks * steps
    read = [
        rank_positions(
            global_batch_size=total, micro_batch_size=micro, data_ranks=ranks, data_rank=rank, micro_index=index
        )
        for index in range(steps)
        for rank in range(ranks)
    ]
    assert np.array_equal(np.concatenate(read), np.arange(total))


@pytest.mark.parametrize("change", [{"global_batch_size": 9}, {"data_rank": 2}, {"data_rank": -1}, {"micro_index": 2}])
def test_positions_out_of_range_are_refused(change):
    right = dict(global_batch_size=8, micro_batch_size=2, data_ranks=2, data_rank=1, micro_index=1)
    assert rank_positions(**right).tolist() == [6, 7]
    with pytest.raises(ValueError):
        rank_positions(**{**right, **change})


@settings(deadline=None, max_examples=100)
@given(num_tokens=st.integers(2, 400), length=st.integers(1, 20))
def test_no_input_is_left_out_but_the_tail(num_tokens, length):
    windows = num_windows(num_tokens, length)
    assert windows * length + 1 <= num_tokens < (windows + 1) * length + 1
    if windows:
        tokens, labels = read_windows([(counting(num_tokens), window) for window in range(windows)], length)
        assert tokens.flatten().tolist() == list(range(windows * length))
        assert torch.equal(labels, tokens + 1)


def test_an_input_is_kept_when_the_label_it_also_is_gets_ignored():
    """Of a single row both might be views of one memory; with three ranks for one window, two rows are padding."""
    tokens, labels = read_windows([(counting(6), 0)], 5)
    labels.fill_(IGNORED_LABEL)
    assert tokens.tolist() == [[0, 1, 2, 3, 4]]
    for rank in (1, 2):
        [(tokens, labels)] = evaluation_batches(
            counting(6), sequence_length=5, micro_batch_size=1, data_ranks=3, data_rank=rank
        )
        assert labels.eq(IGNORED_LABEL).all()
        assert tokens.tolist() == [[0, 1, 2, 3, 4]]


def test_steps_walk_through_the_epochs():
    """10 windows, 4 samples a step: step 3 crosses into the second epoch."""
    reader = BatchReader(parts(31), sequence_length=3, global_batch_size=4, seed=5)
    firsts = []
    for step in range(1, 6):
        batch = reader.batch(step, np.arange(4))
        assert batch.tokens.shape == batch.labels.shape == (4, 3)
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64
        assert batch.samples.tolist() == list(range(4 * step - 4, 4 * step))
        firsts.extend((batch.tokens[:, 0] // 3).tolist())
    assert sorted(firsts[:10]) == sorted(firsts[10:]) == list(range(10))


def test_a_rank_reads_the_same_rows_as_the_whole_batch():
    reader = BatchReader(parts(1000), sequence_length=7, global_batch_size=8, seed=11)
    whole = reader.batch(3, np.arange(8))
    part = reader.batch(3, [5, 2])
    assert torch.equal(part.tokens, whole.tokens[[5, 2]])
    assert torch.equal(part.samples, whole.samples[[5, 2]])


@pytest.mark.parametrize(("step", "positions"), [(0, [0]), (1, [8]), (1, [-1])])
def test_steps_and_positions_out_of_range_are_refused(step, positions):
    reader = BatchReader(parts(100), sequence_length=7, global_batch_size=8, seed=1)
    with pytest.raises(ValueError):
        reader.batch(step, positions)


def test_a_corpus_shorter_than_a_sample_is_refused():
    with pytest.raises(UserError, match=r"counting.bin has 8 tokens, fewer than one sample of 8 \+ 1"):
        BatchReader(parts(8), sequence_length=8, global_batch_size=1, seed=0)


@settings(deadline=None, max_examples=60)
@given(windows=st.integers(1, 30), micro=st.integers(1, 4), ranks=st.integers(1, 4), limit=st.integers(1, 40))
def test_evaluation_reads_the_same_windows_in_every_layout(windows, micro, ranks, limit):
    corpus = counting(windows * 5 + 1)
    seen: list[int] = []
    shapes = set()
    for rank in range(ranks):
        batches = list(
            evaluation_batches(
                corpus,
                sequence_length=5,
                micro_batch_size=micro,
                data_ranks=ranks,
                data_rank=rank,
                samples=limit,
            )
        )
        shapes.add((len(batches), *{tuple(tokens.shape) for tokens, _ in batches}))
        for tokens, labels in batches:
            real = (labels != IGNORED_LABEL).all(dim=1)
            assert torch.equal(labels[real], tokens[real] + 1)
            assert (labels[~real] == IGNORED_LABEL).all()
            seen.extend((tokens[real][:, 0] // 5).tolist())
    assert sorted(seen) == list(range(min(windows, limit)))
    assert len(shapes) == 1 and next(iter(shapes))[1:] == ((micro, 5),)


MIXTURES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=150)
@given(
    mixture=MIXTURES,
    length=st.integers(1, 6),
    layouts=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=4),
    seed=SEEDS,
)
def test_every_token_once_an_epoch_in_any_mixture_layout_and_after_any_resume(mixture, length, layouts, seed):
    """Each entry of `layouts` is a part of the run: micro-batch and data ranks, resumed from the step before."""
    corpora = [
        Part(counting(windows * length + 1), Fraction(weight), f"c{i}") for i, (windows, weight) in enumerate(mixture)
    ]
    global_batch_size = 12
    blend = Blend([part.weight for part in corpora])
    read: list[list[int]] = [[] for _ in corpora]
    for step, (micro, ranks) in enumerate([layout for layout in layouts for _ in range(3)], start=1):
        micro, ranks = (micro, ranks) if global_batch_size % (micro * ranks) == 0 else (1, 1)
        # As a resumed process has it: nothing but the config and the step.
        reader = BatchReader(
            draw_order(corpora, step), sequence_length=length, global_batch_size=global_batch_size, seed=seed
        )
        rows = []
        for index in range(global_batch_size // (micro * ranks)):
            for rank in range(ranks):
                batch = reader.batch(
                    step,
                    rank_positions(
                        global_batch_size=global_batch_size,
                        micro_batch_size=micro,
                        data_ranks=ranks,
                        data_rank=rank,
                        micro_index=index,
                    ),
                )
                rows += list(zip(batch.samples.tolist(), batch.tokens, batch.labels, strict=True))
        assert [sample for sample, *_ in rows] == list(range(global_batch_size * (step - 1), global_batch_size * step))
        places, _ = blend.places(np.array([sample for sample, *_ in rows]))
        for corpus, (_, tokens, labels) in zip(places.tolist(), rows, strict=True):
            window = int(tokens[0]) // length
            assert tokens.tolist() == list(range(window * length, (window + 1) * length))
            assert torch.equal(labels, tokens + 1)
            read[corpus].append(window)
    for (windows, _), seen in zip(mixture, read, strict=True):
        for begin in range(0, len(seen), windows):
            epoch = seen[begin : begin + windows]
            assert len(set(epoch)) == len(epoch)
            assert len(epoch) < windows or sorted(epoch) == list(range(windows))


def draw_order(corpora: list[Part], step: int) -> list[Part]:
    """The corpora as somebody else might list them."""
    return corpora[step % len(corpora) :] + corpora[: step % len(corpora)]


def test_the_order_of_a_corpus_follows_its_name():
    """Two of one size would otherwise be walked through alike."""
    first, second = (
        BatchReader([Part(counting(101), name=name)], sequence_length=1, global_batch_size=100, seed=1) for name in "ab"
    )
    orders = [reader.batch(1, range(100)).tokens[:, 0].tolist() for reader in (first, second)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
