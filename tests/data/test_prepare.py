"""Claim: a corpus folder appears whole or not at all, holds the text exactly, and is the same bytes each time.

python -m pytest tests/data/test_prepare.py
"""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from slope_dist.data import prepare as prepare_module
from slope_dist.data.corpus import Corpus
from slope_dist.data.jobs import RowOptions, Sample, is_valid_document, token_dtype
from slope_dist.data.prepare import prepare, prepare_if_absent
from slope_dist.data.readers import Document
from slope_dist.data.sources import text_files
from slope_dist.errors import UserError

FILES = {"train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer.model", "manifest.json"}


def split_texts(corpus: Corpus) -> list[str]:
    """The documents of a split, by cutting its tokens at the end-of-document ids."""
    ids = corpus.tokens(0, corpus.num_tokens)
    ends = np.flatnonzero(ids == corpus.end_of_document)
    assert ends[-1] == len(ids) - 1
    return [corpus.tokenizer.decode(part[:-1]) for part in np.split(ids, ends[:-1] + 1)]


def test_what_is_read_back_is_the_text(whole_corpus, texts, tokenizer):
    assert {path.name for path in whole_corpus.iterdir()} == FILES
    for split in ("train", "valid"):
        expected = [
            text
            for number, text in enumerate(texts)
            if text and is_valid_document(f"document {number}", 1, 0.2) == (split == "valid")
        ]
        assert len(expected) > 3
        corpus = Corpus.open(whole_corpus, split, tokenizer.vocab_size)
        assert split_texts(corpus) == expected
        assert corpus.num_documents == len(expected)
        assert corpus.text_bytes == sum(len(text.encode()) for text in expected)
        ids = corpus.tokens(0, corpus.num_tokens)
        assert corpus.tokenizer.piece_bytes()[ids].sum() == corpus.text_bytes


def test_the_manifest_counts_what_is_there(whole_corpus, tokenizer):
    manifest = json.loads((whole_corpus / "manifest.json").read_text())
    assert manifest["documents_without_text"] == 1
    assert manifest["source"] == {"kind": "test"}
    assert manifest["vocab_size"] == tokenizer.vocab_size
    for split, entry in manifest["splits"].items():
        corpus = Corpus.open(whole_corpus, split, tokenizer.vocab_size)
        assert entry["max_id"] == corpus.tokens(0, corpus.num_tokens).max() == corpus.max_id
        assert entry["bin_bytes"] == 2 * entry["tokens"] == 2 * corpus.num_tokens
        corpus.verify()


def test_two_preparations_give_the_same_bytes(tmp_path, make_texts):
    made = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        for number, text in enumerate(make_texts(30)):
            (tmp_path / name / f"{number}.txt").write_text(text)
        folder = tmp_path / f"{name}-corpus"
        prepare(text_files([str(tmp_path / name)]), folder, vocab_size=330, valid_fraction=0.3, seed=5)
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert made[0].keys() == FILES
    assert made[0] == made[1]


def test_the_split_of_a_document_depends_on_its_name_and_the_seed_alone():
    names = [f"folder/file {number}.txt" for number in range(4000)]
    for fraction in (0.02, 0.5):
        share = np.mean([is_valid_document(name, 9, fraction) for name in names])
        assert abs(share - fraction) < 5 * np.sqrt(fraction * (1 - fraction) / len(names))
    at_half = {name for name in names if is_valid_document(name, 9, 0.5)}
    assert {name for name in names if is_valid_document(name, 9, 0.02)} < at_half
    assert at_half != {name for name in names if is_valid_document(name, 10, 0.5)}


TARGET = 40_000


@pytest.fixture
def sampled(monkeypatch, tmp_path):
    """The lines that a tokenizer would be trained on, where `TARGET` bytes of text are wanted."""

    class Seen(Exception):
        pass

    def stop(lines, size, where):
        raise Seen(list(lines))

    def sample(path: Path, workers: int = 1) -> list[str]:
        monkeypatch.setattr(prepare_module, "_TOKENIZER_BYTES", TARGET)
        monkeypatch.setattr(prepare_module, "train_tokenizer", stop)
        with pytest.raises(Seen) as seen:
            folder = tmp_path / f"{path.name}-corpus"
            prepare(text_files([str(path)]), folder, vocab_size=300, valid_fraction=0.02, seed=5, workers=workers)
        return seen.value.args[0]

    return sample


def test_the_sample_of_plain_text_is_what_hashes_say_and_no_less(tmp_path, sampled, make_texts):
    texts = make_texts(800)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = RowOptions(seed=5, valid_fraction=0.02, skip_bad_rows=False)
    documents = [Document(name=f"rows.jsonl:{number}", text=text) for number, text in enumerate(texts, start=1)]
    parts = Sample(TARGET / path.stat().st_size, rows)(documents).parts
    expected = [line for part in parts for line in part.decode().split("\n") if line]
    assert TARGET / 2 < sum(map(len, expected)) < 2 * TARGET < path.stat().st_size
    assert sampled(path) == expected


def test_the_sample_of_compressed_text_is_no_larger_for_that(tmp_path, sampled, make_texts):
    path = tmp_path / "rows.jsonl.gz"
    texts = make_texts(40) * 40
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    assert sum(map(len, texts)) > 4 * TARGET > 2 * path.stat().st_size
    found = sampled(path)
    assert TARGET / 2 < sum(map(len, found)) <= 2 * TARGET
    assert sampled(path, workers=2) == found


def test_the_sample_of_parquet_files_does_not_shrink_with_other_columns(tmp_path, sampled, make_texts):
    texts = make_texts(70)
    other = [os.urandom(20_000) for _ in texts]
    table = pyarrow.table({"text": texts, "picture": other})
    parquet.write_table(table, tmp_path / "rows.parquet", use_dictionary=False)
    assert sum(map(len, texts)) < 0.9 * TARGET
    assert sum(map(len, sampled(tmp_path / "rows.parquet"))) > 0.8 * sum(map(len, texts))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(400, np.uint16), (65535, np.uint16), (65536, np.int32)])
def test_ids_are_stored_in_the_smallest_dtype(vocab_size, dtype):
    assert token_dtype(vocab_size) is dtype


INTERRUPTED = """
import sys
from slope_dist.data.prepare import prepare
from slope_dist.data.readers import Document
from slope_dist.data.sources import Source

def documents():
    for number in range(2):
        yield Document(name=str(number), text="the sparse weight\\n" * 300_000), 1
    print("midway", flush=True)
    sys.stdin.read()

prepare(Source(description={}, num_bytes=2, documents=documents), sys.argv[1],
        vocab_size=None, valid_fraction=0.5, seed=0, tokenizer=sys.argv[2])
"""


def test_a_killed_preparation_leaves_no_corpus_and_the_next_one_succeeds(tmp_path, tokenizer_file, texts, make_source):
    folder, partial = tmp_path / "corpus", tmp_path / "corpus.partial"
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(folder), str(tokenizer_file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )

    def again() -> None:
        prepare(make_source(texts), folder, vocab_size=None, valid_fraction=0.2, seed=1, tokenizer=tokenizer_file)

    try:
        assert process.stdout is not None and process.stdout.readline() == b"midway\n"
        assert sum((partial / f"{split}.bin").stat().st_size for split in ("train", "valid")) > 0
        with pytest.raises(UserError, match="another process is writing"):
            again()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not folder.exists()
    assert partial.exists()
    again()
    assert {path.name for path in folder.iterdir()} == FILES
    assert not partial.exists()
    Corpus.open(folder, "train", 400).verify()


def test_a_preparation_that_fails_leaves_nothing(tmp_path, tokenizer_file):
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n{"text": 1}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2"):
        prepare(
            text_files([str(tmp_path / "rows.jsonl")]),
            tmp_path / "corpus",
            vocab_size=None,
            valid_fraction=0.5,
            seed=0,
            tokenizer=tokenizer_file,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.fixture
def small(make_source, make_texts):
    def run(folder: Path, **changes) -> dict:
        arguments = {"vocab_size": 300, "valid_fraction": 0.5, "seed": 0, **changes}
        return prepare(make_source(make_texts(12)), folder, **arguments)

    return run


@pytest.mark.parametrize("leftover", ["notes.txt", "train.bin"])
def test_a_partial_folder_that_is_not_ours_is_left_alone(tmp_path, small, leftover):
    partial = tmp_path / "corpus.partial"
    partial.mkdir()
    (partial / leftover).write_text("mine")
    with pytest.raises(UserError, match="was not made by an earlier attempt"):
        small(tmp_path / "corpus")
    assert (partial / leftover).read_text() == "mine"
    assert not (tmp_path / "corpus").exists()


def test_nothing_is_overwritten_but_an_empty_folder_is_filled(tmp_path, small):
    folder = tmp_path / "corpus"
    folder.mkdir()
    small(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="never overwritten"):
        small(folder, seed=1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="never overwritten"):
        small(tmp_path / "file")
    with pytest.raises(UserError, match="cannot write corpus"):
        small(tmp_path / "file" / "below")


def test_a_link_to_an_empty_folder_is_filled_where_it_points(tmp_path, small):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    small(tmp_path / "link")
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == FILES
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "link"]


def test_splits_without_documents_and_fractions_out_of_range_are_refused(
    tmp_path, small, make_source, make_texts, tokenizer_file
):
    one = make_source(make_texts(1))
    with pytest.raises(UserError, match=r"no document fell into the \w+ split \(documents: 1"):
        prepare(
            one,
            tmp_path / "corpus",
            vocab_size=None,
            valid_fraction=1e-9,
            seed=0,
            tokenizer=tokenizer_file,
        )
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="validation fraction"):
            small(tmp_path / "corpus", valid_fraction=fraction)
    assert list(tmp_path.iterdir()) == []


def test_a_given_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path, small, tokenizer_file):
    with pytest.raises(UserError, match="has 400 ids, more than the vocabulary of 399"):
        small(tmp_path / "corpus", vocab_size=399, tokenizer=tokenizer_file)


def make_config(folder: Path, source: str | None, vocab_size: int):
    from slope_dist.config.schema import Config

    return Config.model_validate(
        {
            "model": {
                "hidden_size": 64,
                "num_layers": 1,
                "num_heads": 4,
                "ffn_size": 64,
                "vocab_size": vocab_size,
                "sequence_length": 16,
            },
            "data": {"folder": str(folder), "source": source, "valid_fraction": 0.02},
            "training": {
                "steps": 1,
                "global_batch_size": 1,
                "micro_batch_size": 1,
                "learning_rate": 1e-3,
            },
        }
    )


def test_the_embedded_default_is_prepared_once_from_a_config(tmp_path):
    folder = tmp_path / "below" / "stdlib"
    config = make_config(folder, "python-stdlib", 512)
    assert prepare_if_absent(config)
    written = (folder / "manifest.json").stat().st_mtime_ns
    assert not prepare_if_absent(config)
    assert (folder / "manifest.json").stat().st_mtime_ns == written
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["seed"], manifest["valid_fraction"]) == (config.run.seed, 0.02)
    corpus = Corpus.open(folder, "valid", 512)
    name = next(name for name in sorted(_stdlib_names()) if is_valid_document(name, config.run.seed, 0.02))
    assert split_texts(corpus)[0] == (Path(os.__file__).parent / name).read_bytes().decode()


def _stdlib_names() -> list[str]:
    from slope_dist.data.sources import python_stdlib

    return [document.name for document, _ in python_stdlib().documents() if document.text]


def test_an_impossible_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read corpus .* \(data\.folder\): File name too long"):
        prepare_if_absent(make_config(tmp_path / ("x" * 300), "python-stdlib", 512))


def test_an_absent_corpus_without_a_source_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no corpus in .*; make one with tools/prepare_data.py"):
        prepare_if_absent(make_config(tmp_path / "corpus", None, 512))
