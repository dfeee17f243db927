"""Claim: 1 GB of text is prepared and read in memory that does not grow with it, on every process.

Takes minutes, so it is slow:

    python -m pytest tests/data/test_large.py -m slow
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from slope_dist.data.corpus import Corpus
from slope_dist.data.sampling import BatchReader, Part
from slope_dist.data.sentencepiece_model import train_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TEXT_BYTES = 10**9
VOCAB_SIZE = 4096
MIB = 2**20


def write_text(path: Path) -> None:
    """Documents of words that get rarer, of some 2 kB; the same text again and again would be too easy to keep."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randrange(2, 11))) for _ in range(20_000)]
    weights = np.cumsum([1 / rank for rank in range(1, len(words) + 1)]).tolist()
    written = 0
    with path.open("w") as stream:
        while written < TEXT_BYTES:
            text = " ".join(draw.choices(words, cum_weights=weights, k=draw.randrange(50, 500)))
            written += stream.write(json.dumps({"text": text}) + "\n")


def most_memory(command: list[str], folder: Path) -> tuple[int, int]:
    """Run a command; the most resident memory of any of its processes, in the first quarter of its time and in all."""
    peaks: list[tuple[float, int]] = []
    start = time.monotonic()
    running = subprocess.Popen(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)})
    process = psutil.Process(running.pid)
    while running.poll() is None:
        held = [0]
        for one in (process, *children(process)):
            try:
                held.append(one.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        peaks.append((time.monotonic() - start, max(held)))
        time.sleep(0.25)
    assert running.returncode == 0
    quarter = peaks[-1][0] / 4
    return max(rss for when, rss in peaks if when <= quarter), max(rss for _, rss in peaks)


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def test_a_gigabyte_is_prepared_and_read_in_flat_memory(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    write_text(text)
    with text.open() as stream:
        lines = [json.loads(next(stream))["text"] for _ in range(2000)]
    (tmp_path / "given.model").write_bytes(train_tokenizer(lines, VOCAB_SIZE))
    tool = [sys.executable, str(ROOT / "tools/prepare_data.py")]
    start = time.monotonic()
    early, most = most_memory([*tool, "text.jsonl", "--output", "corpus", "--tokenizer", "given.model"], tmp_path)
    seconds = time.monotonic() - start
    corpus = Corpus.open(tmp_path / "corpus", "train", VOCAB_SIZE)
    reader = BatchReader([Part(corpus)], sequence_length=2048, global_batch_size=16, seed=0)
    steps = corpus.num_tokens // 2048 // 16
    process = psutil.Process()
    positions = np.arange(16)
    for step in range(1, 50):
        reader.batch(step, positions)
    before = process.memory_info().rss
    start, seen, grown = time.monotonic(), 0, 0
    for step in range(1, steps + 1):
        seen += int(reader.batch(step, positions).samples.numel())
        if step % 100 == 0:
            grown = max(grown, process.memory_info().rss - before)
    print(
        f"prepared {TEXT_BYTES / 1e6:.0f} MB in {seconds:.0f} s, most memory of a process {most / MIB:.0f} MiB, "
        f"{early / MIB:.0f} MiB in the first quarter; read {seen} samples of 2,048 tokens in "
        f"{time.monotonic() - start:.1f} s, memory grew by {grown / MIB:.1f} MiB"
    )
    assert most <= early + 32 * MIB
    assert grown <= 16 * MIB
    assert seen == steps * 16 > 100_000 * TEXT_BYTES / 10**9
