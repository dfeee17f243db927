"""Samples read from a corpus: by `BatchReader`, and by Megatron-core's `GPTDataset`, whose files both read.

B batch, S sequence.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slope_dist.benchmark import memory, timing
from slope_dist.benchmark.timing import WrongResultError
from slope_dist.data.corpus import Corpus
from slope_dist.data.prepare import megatron_indexed_dataset
from slope_dist.data.sampling import BatchReader, Part

MEGATRON, OURS = "megatron-core", "slope_dist"
RIVALS = (MEGATRON, OURS)

VOCAB_SIZE = 50_000
DOCUMENT_TOKENS = 1000
"""Mean length."""

Read = Callable[[int], tuple[Tensor, Tensor]]
"""Inputs and labels, int64 [B, S] each, of the n-th batch."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is read.

    Attributes:
        samples: that are read in all for the memory; the corpus has as many.
        sequence_length: S.
        batch_size: B.
        batches: read in one turn.
    """

    samples: int = 100_000
    sequence_length: int = 2048
    batch_size: int = 16
    batches: int = 64


def measure(size: Size, seconds: float, folder: Path | None = None) -> dict[str, Any]:
    """Tokens a second of both, in turns, and by how much the resident memory of each grows over all samples.

    Args:
        size: what is read.
        seconds: about how long to time.
        folder: where to put the corpus meanwhile; None: the system's temporary folder.

    Raises:
        WrongResultError: a reader is wrong, and nothing was timed.
    """
    with tempfile.TemporaryDirectory(prefix="loading-", dir=folder) as place:
        make_corpus(Path(place), size)
        openers: dict[str, Callable[[], Read]] = {
            MEGATRON: lambda: megatron_reader(Path(place), size),
            OURS: lambda: our_reader(Path(place), size),
        }
        rivals: dict[str, dict[str, float]] = {}
        for name, opener in openers.items():
            rivals[name] = {"grown_bytes": memory.peak_of(partial(_walk, opener, size), torch.device("cpu"))}
        readers = {name: opener() for name, opener in openers.items()}
        for name, read in readers.items():
            check(name, read, size)
        turns = {name: _turn(read, size) for name, read in readers.items()}
        tokens = size.batches * size.batch_size * size.sequence_length
        for name, timed in timing.in_turns(turns, torch.device("cpu"), seconds).items():
            rivals[name] |= timed.summary()
            rivals[name]["tokens_per_second"] = tokens / rivals[name]["seconds"]
        corpus_bytes = Path(place, "train.bin").stat().st_size
    return {
        "samples": size.samples,
        "sequence_length": size.sequence_length,
        "batch_size": size.batch_size,
        "corpus_bytes": corpus_bytes,
        "rivals": rivals,
    }


def make_corpus(folder: Path, size: Size) -> None:
    """Write random tokens, in documents of random lengths, as Megatron-core's builder does."""
    draw = np.random.default_rng(0)
    module = megatron_indexed_dataset()
    for split, wanted in (("train", size.samples * size.sequence_length + 1), ("valid", size.sequence_length + 1)):
        builder = module.IndexedDatasetBuilder(str(folder / f"{split}.bin"), dtype=np.uint16)
        left = wanted
        while left:
            count = min(left, int(draw.integers(1, 2 * DOCUMENT_TOKENS)))
            builder.add_document(draw.integers(0, VOCAB_SIZE, count, dtype=np.uint16), [count])
            left -= count
        builder.finalize(str(folder / f"{split}.idx"))


def our_reader(folder: Path, size: Size) -> Read:
    """Batches as a run reads them."""
    reader = BatchReader(
        [Part(Corpus.open(folder, "train", VOCAB_SIZE))],
        sequence_length=size.sequence_length,
        global_batch_size=size.batch_size,
        seed=0,
    )
    positions = np.arange(size.batch_size)

    def read(number: int) -> tuple[Tensor, Tensor]:
        batch = reader.batch(number + 1, positions)
        return batch.tokens, batch.labels

    return read


def megatron_reader(folder: Path, size: Size) -> Read:
    """Samples of GPTDataset, made into batches; without attention masks, which fused attention does not read."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=size.sequence_length,
        blend=([str(folder / "train")], None),
        split="1",
        path_to_cache=str(folder / "cache"),
        # It only asks for the size of the vocabulary and the ids of two tokens.
        tokenizer=SimpleNamespace(vocab_size=VOCAB_SIZE, eod=0, pad=1, unique_identifiers={"name": "random"}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    source = megatron_indexed_dataset().IndexedDataset(str(folder / "train"))
    documents = np.arange(len(source), dtype=np.int32)
    dataset = GPTDataset(source, str(folder / "train"), documents, size.samples, Split.train, config)

    def read(number: int) -> tuple[Tensor, Tensor]:
        first = number * size.batch_size
        rows = [dataset[index % len(dataset)] for index in range(first, first + size.batch_size)]
        return torch.stack([row["tokens"] for row in rows]), torch.stack([row["labels"] for row in rows])

    return read


def check(name: str, read: Read, size: Size) -> None:
    """See that a reader gives batches.

    Raises:
        WrongResultError: it does not.
    """
    shape = (size.batch_size, size.sequence_length)
    for number in range(min(4, size.samples // size.batch_size)):
        tokens, labels = read(number)
        right = tokens.shape == labels.shape == shape and tokens.dtype == labels.dtype == torch.int64
        if not right or not torch.equal(tokens[:, 1:], labels[:, :-1]) or len(tokens.unique()) < 2:
            raise WrongResultError(f"{name}, batch {number}")


def _turn(read: Read, size: Size) -> Callable[[], None]:
    """Reads the next batches at each call."""
    done = 0

    def turn() -> None:
        nonlocal done
        for number in range(done, done + size.batches):
            read(number)
        done += size.batches

    return turn


def _walk(opener: Callable[[], Read], size: Size) -> Callable[[], None]:
    """Reads all samples; the first hundredth has been before, for what is allocated once."""
    read = opener()
    batches = size.samples // size.batch_size
    for number in range(batches // 100):
        read(number)

    def walk() -> None:
        for number in range(batches // 100, batches):
            read(number)

    return walk
