"""Text to tokens on disk: `prepare` beside `datasets.map` with the same tokenizer, processes and text.

`datasets` loads the rows of a .jsonl file and maps them to ids, as its own guides do it; its Arrow files are the end.
`prepare` reads the rows, encodes them, reads each document back, splits train and valid, and hashes all.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from slope_dist.benchmark.timing import WrongResultError
from slope_dist.data.prepare import prepare
from slope_dist.data.sentencepiece_model import train_tokenizer
from slope_dist.data.sources import text_files

OURS = "slope_dist"
THEIRS = "datasets"
KINDS = ("tokenizer.json", "tokenizer.model")
"""Tokenizers, by the library that encodes: `tokenizers`, or SentencePiece."""

MB = 10**6
_VOCAB_SIZE = 8192
_SAMPLE = 2 * MB
_VALID_FRACTION = 0.01


def measure(megabytes: float, workers: int, rounds: int, kinds: list[str]) -> list[dict[str, Any]]:
    """Seconds of each rival for each kind of tokenizer, in turns, the order turning by one each round.

    Args:
        megabytes: size of the .jsonl file.
        workers: processes of each rival.
        rounds: times each runs, after one that is only checked.
        kinds: of `KINDS`.

    Raises:
        WrongResultError: they made other tokens.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = folder / "rows.jsonl"
        _write_rows(text, int(megabytes * MB))
        return [_row(text, kind, folder, workers, rounds) for kind in kinds]


def _row(text: Path, kind: str, folder: Path, workers: int, rounds: int) -> dict[str, Any]:
    tokenizer = folder / kind
    tokenizer.write_bytes(_TRAINERS[kind](text))
    rivals: dict[str, Callable[[Path], int]] = {
        OURS: lambda place: _prepare(text, tokenizer, place, workers),
        THEIRS: lambda place: _map(text, tokenizer, place, workers),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    tokens = {name: _timed(run)[1] for name, run in rivals.items()}
    if len(set(tokens.values())) != 1:
        raise WrongResultError(f"{kind}: tokens of the same text are {tokens}")
    names = list(rivals)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(_timed(rivals[name])[0])
    size = text.stat().st_size
    ratios = [ours / theirs for ours, theirs in zip(seconds[OURS], seconds[THEIRS], strict=True)]
    return {
        "tokenizer": kind,
        "vocab_size": _VOCAB_SIZE,
        "bytes": size,
        "tokens": tokens[OURS],
        "workers": workers,
        "rounds": rounds,
        "rivals": {
            name: {
                "seconds": taken,
                "median": statistics.median(taken),
                "mb_per_second": size / MB / statistics.median(taken),
            }
            for name, taken in seconds.items()
        },
        "ratios": ratios,
        "ratio": statistics.median(ratios),
    }


def _timed(run: Callable[[Path], int]) -> tuple[float, int]:
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        tokens = run(Path(place))
        return time.perf_counter() - start, tokens


def _prepare(text: Path, tokenizer: Path, place: Path, workers: int) -> int:
    """Prepare a corpus; returns how many tokens it has, without the ends of documents."""
    # Its lines of progress are not the benchmark's.
    with contextlib.redirect_stderr(io.StringIO()):
        manifest = prepare(
            text_files([str(text)]),
            place / "corpus",
            vocab_size=None,
            valid_fraction=_VALID_FRACTION,
            seed=0,
            tokenizer=tokenizer,
            workers=workers,
        )
    return sum(entry["tokens"] - entry["documents"] for entry in manifest["splits"].values())


def _map(text: Path, tokenizer: Path, place: Path, workers: int) -> int:
    """Load and map the rows; returns how many tokens they have."""
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=str(place))
    made = rows.map(
        _ids_of,
        batched=True,
        remove_columns=rows.column_names,
        num_proc=workers if workers > 1 else None,
        fn_kwargs={"path": str(tokenizer)},
    )
    return sum(len(ids) for chunk in made.data.column("input_ids").chunks for ids in [chunk.flatten()])


def _ids_of(batch: dict[str, list[str]], path: str) -> dict[str, list[Any]]:
    return {"input_ids": _encoder(path)(batch["text"])}


@lru_cache
def _encoder(path: str) -> Callable[[list[str]], list[Any]]:
    if path.endswith(".json"):
        import tokenizers

        loaded = tokenizers.Tokenizer.from_file(path)
        return lambda texts: [found.ids for found in loaded.encode_batch_fast(texts, add_special_tokens=False)]
    import sentencepiece

    processor: Any = sentencepiece.SentencePieceProcessor(model_file=path)
    return lambda texts: processor.encode(texts, num_threads=1)


def _write_rows(path: Path, size: int) -> None:
    """Rows of words that nobody would write, as often as words of their rank are, up to the size."""
    draw = np.random.default_rng(0)
    letters = random.Random(0)
    words = np.array(["".join(letters.choices("etaoinshrdlu", k=letters.randrange(1, 10))) for _ in range(20_000)])
    weights = 1 / np.arange(1, len(words) + 1)
    weights /= weights.sum()
    with path.open("w") as file:
        while file.tell() < size:
            lines = (" ".join(words[draw.choice(len(words), 12, p=weights)]) for _ in range(draw.integers(2, 60)))
            file.write(json.dumps({"text": "\n".join(lines)}) + "\n")


def _sample(text: Path) -> Iterator[str]:
    taken = 0
    with text.open() as file:
        for row in file:
            yield json.loads(row)["text"]
            taken += len(row)
            if taken > _SAMPLE:
                return


def _train_byte_level(text: Path) -> bytes:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made: Any = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(_sample(text), trainer)
    return made.to_str().encode()


def _train_sentencepiece(text: Path) -> bytes:
    lines = (line for row in _sample(text) for line in row.split("\n"))
    return train_tokenizer(lines, _VOCAB_SIZE, where="the benchmark's text")


_TRAINERS = {KINDS[0]: _train_byte_level, KINDS[1]: _train_sentencepiece}
