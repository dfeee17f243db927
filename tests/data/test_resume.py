"""Claim: a preparation that a kill, Ctrl-C or a full disk stopped is gone on with, to the same bytes as without a stop,
and nothing that was stopped is gone on with if its text, its options or its files are others.

    python -m pytest tests/data/test_resume.py
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slope_dist.data import prepare as preparing
from slope_dist.data import readers, staging
from slope_dist.data.journal import write_index
from slope_dist.data.prepare import megatron_indexed_dataset, prepare
from slope_dist.data.readers import Document
from slope_dist.data.sources import Source, text_files
from slope_dist.errors import UserError

DRIVER = """
import sys
from slope_dist.data import journal, prepare, readers, sources
journal._COMMIT_SECONDS = 0.0
prepare._BATCH_BYTES = 10_000
readers._BYTES_AT_ONCE = 5_000
add = journal.TokenFiles.add

def told(self, *arguments):
    sys.stdin.readline()
    add(self, *arguments)
    print(self.state["batches"], flush=True)

journal.TokenFiles.add = told
text, folder, workers, vocab_size = sys.argv[1:]
source = sources.text_files([text], skip_bad_rows=True)
prepare.prepare(source, folder, vocab_size=int(vocab_size), valid_fraction=0.2, seed=3, workers=int(workers))
"""
"""Each batch waits for a line, or for the end of the input."""

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.fixture(scope="module")
def text(tmp_path_factory, make_texts):
    folder = tmp_path_factory.mktemp("text")
    for name in ("a.jsonl", "b.jsonl"):
        with (folder / name).open("w") as file:
            for number, own in enumerate(make_texts(300, seed=len(name))):
                file.write(json.dumps({"text": own if number % 50 else ""}) + "\n" if number % 40 else "{\n\n")
    return folder


def start(text: Path, folder: Path, workers: int = 2, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(text), str(folder), str(workers), "400"],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "corpus"
    process = start(text, folder, workers=1)
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert int(out.split()[-1]) > 15, "many batches"
    return files_of(folder)


def stop_after(process: subprocess.Popen[str], batches: int, which: signal.Signals) -> str:
    """Stop it somewhere in the batch behind these, or between the batches; returns what it said."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n" * batches)
    process.stdin.flush()
    for _ in range(batches):
        process.stdout.readline()
    process.stdin.write("\n")
    process.stdin.flush()
    process.send_signal(which)
    # Its input ends, too: what a signal does not stop goes on to its end, and is seen to.
    _, error = process.communicate()
    return error


def test_kills_at_random_points_change_no_byte(text, whole, tmp_path):
    draw = random.Random(7)
    folder = tmp_path / "corpus"
    kills, went_on = 0, 0
    for _ in range(12):
        process = start(text, folder, workers=draw.choice([1, 2]), stdin=subprocess.PIPE)
        which = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
        error = stop_after(process, draw.randrange(4), which)
        went_on += "going on with" in error
        if folder.exists():
            break
        assert process.returncode != 0
        kills += 1
    else:
        process = start(text, folder)
        _, error = process.communicate()
        assert process.returncode == 0, error
        went_on += "going on with" in error
    assert kills >= 4 and went_on >= 2
    assert files_of(folder) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    manifest = json.loads(whole["manifest.json"])
    assert manifest["rows_rejected"] == 16 and manifest["documents_without_text"] == 8


def stopped(text: Path, folder: Path, after: int = 5) -> Path:
    """The folder that a kill after so many batches leaves."""
    stop_after(start(text, folder, stdin=subprocess.PIPE), after, signal.SIGKILL)
    return folder.with_name(folder.name + ".partial")


def finished(text: Path, folder: Path) -> str:
    process = start(text, folder)
    _, error = process.communicate()
    assert process.returncode == 0, error
    return error


def test_half_a_line_of_the_journal_and_tokens_behind_it_do_not_count(text, whole, tmp_path):
    partial = stopped(text, tmp_path / "corpus")
    with (partial / "journal.jsonl").open("ab") as file:
        file.write(b'{"batches": 9')
    with (partial / "train.bin").open("ab") as file:
        file.write(b"never stated")
    assert "going on with" in finished(text, tmp_path / "corpus")
    assert files_of(tmp_path / "corpus") == whole


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "tokens": (lambda partial: flip(partial / "train.bin"), "train.bin is not what the journal states"),
    "short": (lambda partial: (partial / "valid.lengths").write_bytes(b""), "valid.lengths is not what the journal"),
    "journal": (lambda partial: flip(partial / "journal.jsonl"), ""),
    "no header": (lambda partial: (partial / "journal.jsonl").write_text("{}\n{}\n"), "its journal is damaged"),
    "no lines": (lambda partial: (partial / "journal.jsonl").write_text(""), ""),
    "tokenizer": (lambda partial: (partial / "tokenizer.model").write_bytes(b"x"), "its tokenizer is damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_leftovers_are_started_over(text, whole, tmp_path, case):
    damage, message = DAMAGE[case]
    damage(stopped(text, tmp_path / "corpus"))
    error = finished(text, tmp_path / "corpus")
    assert "going on with" not in error.replace("not going on with", "")
    assert message in error
    assert files_of(tmp_path / "corpus") == whole


def test_other_text_is_started_over(text, tmp_path):
    own = tmp_path / "text"
    own.mkdir()
    for path in text.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    stopped(own, tmp_path / "corpus")
    changed = (own / "a.jsonl").read_text().replace("sparse", "SPARSE", 1)
    (own / "a.jsonl").write_text(changed)
    error = finished(own, tmp_path / "corpus")
    assert "corpus.partial: " in error and "a.jsonl changed since it was first read" in error
    finished(own, tmp_path / "again")
    assert files_of(tmp_path / "corpus") == files_of(tmp_path / "again")


@pytest.fixture
def stopping(monkeypatch, make_texts, tokenizer_file):
    """Prepares in this process; the source stops it after so many of its documents."""
    monkeypatch.setattr(preparing, "_BATCH_BYTES", 1000)
    monkeypatch.setattr("slope_dist.data.journal._COMMIT_SECONDS", 0.0)
    texts = make_texts(40)

    def run(folder: Path, stop: BaseException | None = None, *, texts: list[str] = texts, **changes) -> dict:
        def documents():
            for number, text in enumerate(texts):
                if stop is not None and number == 30:
                    raise stop
                yield Document(name=f"document {number}", text=text), 1

        source = Source(description={"kind": "test"}, num_bytes=len(texts), documents=documents)
        arguments = {"vocab_size": None, "tokenizer": tokenizer_file, "valid_fraction": 0.4, "seed": 0, "workers": 1}
        return prepare(source, folder, **(arguments | changes))

    return run


def test_a_disk_that_is_full_at_the_very_end_costs_nothing(stopping, tmp_path, monkeypatch, capsys):
    """When all is written but the indices are not yet on the disk."""
    stopping(tmp_path / "whole")
    with monkeypatch.context() as patch:
        fsync = staging.fsync

        def full(path: Path) -> None:
            if path.name == "train.idx":
                raise OSError(28, "No space left on device", str(path))
            fsync(path)

        patch.setattr(staging, "fsync", full)
        with pytest.raises(UserError, match=r"No space left on device.*; the same command goes on where this one was"):
            stopping(tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()
    stopping(tmp_path / "corpus")
    assert "going on with" in capsys.readouterr().err
    assert files_of(tmp_path / "corpus") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("when", ["while it encodes", "while it compares"])
def test_input_that_cannot_be_read_just_now_costs_nothing(text, whole, tmp_path, monkeypatch, when):
    partial = stopped(text, tmp_path / "corpus")
    stated = (partial / "journal.jsonl").read_bytes()
    monkeypatch.setattr(preparing, "_BATCH_BYTES", 10_000)
    monkeypatch.setattr(readers, "_BYTES_AT_ONCE", 5_000)
    left = 1 if when == "while it encodes" else 0
    digest = hashlib.file_digest

    def stale(stream, name):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(116, "Stale file handle")
        return digest(stream, name)

    with monkeypatch.context() as patch:
        patch.setattr("slope_dist.data.sources.hashlib.file_digest", stale)
        source = text_files([str(text)], skip_bad_rows=True)
        with pytest.raises(UserError, match=r"Stale file handle.*; the same command goes on where this one was"):
            prepare(source, tmp_path / "corpus", vocab_size=400, valid_fraction=0.2, seed=3, workers=1)
    assert (partial / "journal.jsonl").read_bytes().startswith(stated)
    assert "going on with" in finished(text, tmp_path / "corpus")
    assert files_of(tmp_path / "corpus") == whole


def test_what_stops_in_this_process_is_gone_on_with(stopping, tmp_path, capsys):
    stopping(tmp_path / "whole")
    for stop in (KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError()):
        with pytest.raises((KeyboardInterrupt, UserError, MemoryError)) as caught:
            stopping(tmp_path / "corpus", stop)
        if isinstance(stop, OSError):
            assert "No space left on device; the same command goes on where this one was" in str(caught.value)
        assert not (tmp_path / "corpus").exists() and (tmp_path / "corpus.partial").is_dir()
    stopping(tmp_path / "corpus")
    assert capsys.readouterr().err.count("\ngoing on with") == 3
    assert files_of(tmp_path / "corpus") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "it was begun with other options"),
        ({"valid_fraction": 0.5}, "it was begun with other options"),
        ({"tokenizer": None, "vocab_size": 300}, "it was begun with other tokenizer"),
        ({"texts": ["more text\n" * 300] * 40}, "its text was another"),
        ({"texts": ["few texts\n"] * 20}, "it was begun with other text"),
    ],
)
def test_other_options_are_started_over(stopping, tmp_path, capsys, changes, message):
    stopping(tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        stopping(tmp_path / "corpus", KeyboardInterrupt())
    stopping(tmp_path / "corpus", **changes)
    assert f"corpus.partial: {message}; starting over\n" in capsys.readouterr().err
    assert files_of(tmp_path / "corpus") == files_of(tmp_path / "whole")


LIMITED = """
import resource, signal, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop()),) * 2)
"""


def test_a_disk_that_is_full_is_told_in_a_line_and_gone_on_with(text, whole, tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", LIMITED + DRIVER, str(text), str(tmp_path / "corpus"), "2", "400", "60000"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
    )
    assert process.returncode == 1 and "File too large; the same command goes on" in process.stderr.splitlines()[-1]
    assert "going on with" in finished(text, tmp_path / "corpus")
    assert files_of(tmp_path / "corpus") == whole


def test_a_file_that_changes_between_passes_is_refused_by_name(tmp_path, monkeypatch, make_texts):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (texts / name).write_text("".join(make_texts(9, seed=ord(name[0]))))
    train = preparing.train_tokenizer

    def change(*arguments, **keywords):
        (texts / "c.txt").write_text((texts / "c.txt").read_text().upper())
        return train(*arguments, **keywords)

    arguments = {"vocab_size": 300, "valid_fraction": 0.5, "seed": 1}
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "train_tokenizer", change)
        with pytest.raises(UserError, match=r"c\.txt changed since it was first read"):
            prepare(text_files([str(texts)]), tmp_path / "corpus", **arguments)
    assert not (tmp_path / "corpus").exists()
    # What was done of the text that it was is not gone on with.
    prepare(text_files([str(texts)]), tmp_path / "corpus", **arguments)
    prepare(text_files([str(texts)]), tmp_path / "again", **arguments)
    assert files_of(tmp_path / "corpus") == files_of(tmp_path / "again")


def test_a_file_that_grows_while_it_is_read_is_refused_by_name(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n' * 9)
    items = text_files([str(path)]).items()
    next(items)
    with path.open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"a\.jsonl changed since it was first read"):
        list(items)


def test_the_manifest_names_the_inputs_without_their_folders(whole, text):
    import hashlib

    manifest = json.loads(whole["manifest.json"])
    assert manifest["inputs"] == [
        {
            "name": name,
            "bytes": (text / name).stat().st_size,
            "sha256": hashlib.sha256((text / name).read_bytes()).hexdigest(),
        }
        for name in ("a.jsonl", "b.jsonl")
    ]
    assert str(text) not in whole["manifest.json"].decode()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_the_index_is_the_one_that_megatron_core_writes(tmp_path, monkeypatch, dtype, chunk):
    monkeypatch.setattr("slope_dist.data.journal._CHUNK", chunk)
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 40, 20).astype(np.int32)
    builder = megatron_indexed_dataset().IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=dtype)
    for length in lengths.tolist():
        builder.add_document(np.zeros(length, dtype), [length])
    builder.finalize(str(tmp_path / "a.idx"))
    (tmp_path / "lengths").write_bytes(lengths.tobytes())
    write_index(tmp_path / "b.idx", tmp_path / "lengths", dtype)
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()
