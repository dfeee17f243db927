"""Claim: any number of worker processes makes the same bytes as one process does, and one that dies ends in a line.

python -m pytest tests/data/test_workers.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from slope_dist.data import prepare as preparing
from slope_dist.data.jobs import Encode, RowOptions
from slope_dist.data.load_tokenizer import load_tokenizer
from slope_dist.data.prepare import prepare
from slope_dist.data.readers import Document, Lines, Rejected
from slope_dist.data.sources import text_files
from slope_dist.data.workers import UnfinishedError, in_order, pack, unpack
from slope_dist.errors import UserError

ROWS = RowOptions(seed=0, valid_fraction=0.2, skip_bad_rows=True)


@pytest.fixture
def rows(tmp_path, make_texts) -> Path:
    """Files of several batches: every 40th row is bad."""
    for name in ("a.jsonl", "b.jsonl"):
        with (tmp_path / name).open("w") as file:
            for number, text in enumerate(make_texts(400, seed=len(name))):
                file.write(json.dumps({"text": text}) + "\n" if number % 40 else "{\n\n")
    (tmp_path / "c.txt").write_text("text of its own\n" * 9000)
    return tmp_path


@pytest.fixture
def many_batches(monkeypatch):
    monkeypatch.setattr(preparing, "_BATCH_BYTES", 20_000)
    monkeypatch.setattr("slope_dist.data.readers._BYTES_AT_ONCE", 10_000)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "given"])
def test_any_number_of_workers_gives_the_same_bytes(rows, tmp_path, tokenizer_file, many_batches, trained):
    made = {}
    for workers in (1, 2, 3):
        prepare(
            text_files([str(rows / "*.*")], skip_bad_rows=True),
            tmp_path / f"corpus-{workers}",
            vocab_size=400 if trained else None,
            tokenizer=None if trained else tokenizer_file,
            valid_fraction=0.2,
            seed=3,
            workers=workers,
        )
        made[workers] = files_of(tmp_path / f"corpus-{workers}")
    assert made[1] == made[2] == made[3]
    manifest = json.loads(made[1]["manifest.json"])
    assert manifest["rows_rejected"] == 20
    assert sum(entry["documents"] for entry in manifest["splits"].values()) == 781


def test_the_first_bad_row_is_the_one_that_is_told(rows, tmp_path, tokenizer_file, many_batches):
    """Though the reader meets a damaged file before the workers have told of the row."""
    (rows / "a.jsonl.gz").write_bytes(b"damaged")
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"a\.jsonl:1: not a JSON object"):
            prepare(
                text_files([str(rows / "a.jsonl"), str(rows / "a.jsonl.gz")]),
                tmp_path / "corpus",
                vocab_size=None,
                tokenizer=tokenizer_file,
                valid_fraction=0.2,
                seed=3,
                workers=workers,
            )
        assert not (tmp_path / "corpus.partial").exists()


def test_messages_give_back_what_was_sent():
    batch = [
        Document(name="a", text="\u00e9\n\0"),
        Rejected("b: why"),
        Document(name="c", text=""),
        Lines(name="d", path="/x/d", field="text", first=7, data=b'{"text": "\xff'),
    ]
    header, parts = pack(batch)
    assert unpack(json.loads(json.dumps(header)), b"".join(parts)) == batch


def test_few_batches_are_read_ahead(tokenizer_file):
    read = 0

    def batches():
        nonlocal read
        for number in range(100):
            read += 1
            yield [Document(name=str(number), text="the sparse weight " * 50)], number

    results = in_order(Encode(load_tokenizer(tokenizer_file), tokenizer_file, ROWS), batches(), 2)
    for expected in range(100):
        tag, _ = next(results)
        assert tag == expected and read <= tag + 9
    results.close()


def children(of: int | None = None) -> list[int]:
    return [child.pid for child in psutil.Process(of).children()]


@pytest.mark.parametrize("which", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_worker_is_told(tokenizer_file, which):
    def batches():
        for number in range(1000):
            yield [Document(name=str(number), text="the sparse weight " * 500)], number

    results = in_order(Encode(load_tokenizer(tokenizer_file), tokenizer_file, ROWS), batches(), 2)
    before = set(children())
    next(results)
    victim = (set(children()) - before).pop()
    os.kill(victim, which)
    with pytest.raises(UnfinishedError, match=f"worker process {victim} was killed by {which.name}"):
        list(results)
    assert set(children()) == before, "the others end with it"


INTERRUPTED = """
import sys
from slope_dist.data import prepare as preparing
from slope_dist.data.readers import Document
from slope_dist.data.sources import Source

def documents():
    for number in range(10**6):
        yield Document(name=str(number), text="the sparse weight\\n" * 50_000), 1
        if number == 9:
            print("midway", flush=True)

preparing.prepare(Source(description={}, num_bytes=2, documents=documents), sys.argv[1],
        vocab_size=None, valid_fraction=0.5, seed=0, tokenizer=sys.argv[2], workers=2)
"""


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent_and_say_nothing(tmp_path, tokenizer_file, which):
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path / "corpus"), str(tokenizer_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        start_new_session=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"midway\n"
        own = children(process.pid)
        # To the whole group, as a terminal sends Ctrl-C.
        os.killpg(process.pid, which)
        # Both pipes end when the last process that holds them does.
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert len(own) == 2 and process.returncode == -which
    assert error.count(b"Traceback") == (which == signal.SIGINT), "that of the parent alone"
    assert not (tmp_path / "corpus").exists()
