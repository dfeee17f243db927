"""Claim: a damaged corpus is refused before a token of it is used, by one line that names the file.

Damage that keeps every size and offset (a changed token below the vocabulary size) is found by `verify` only.

    python -m pytest tests/data/test_corpus.py
"""

from __future__ import annotations

import json
import random
import re
import shutil
import struct

import numpy as np
import pytest
import torch

from slope_dist.config.schema import Config
from slope_dist.data.corpus import Corpus
from slope_dist.data.index import read_index
from slope_dist.data.journal import blocks_sha256
from slope_dist.data.load_tokenizer import load_tokenizer
from slope_dist.data.sampling import IGNORED_LABEL, BatchReader, Part, evaluation_batches
from slope_dist.data.sentencepiece_model import train_tokenizer
from slope_dist.errors import UserError

VOCAB_SIZE = 400


def refused(folder, message: str, split: str = "train", vocab_size: int = VOCAB_SIZE) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Corpus.open(folder, split, vocab_size)
    assert "\n" not in str(caught.value)


def test_any_run_of_tokens_is_a_slice_of_the_split(whole_corpus):
    corpus = Corpus.open(whole_corpus, "train", VOCAB_SIZE)
    whole = np.fromfile(whole_corpus / "train.bin", dtype=np.uint16).astype(np.int64)
    assert corpus.num_tokens == len(whole)
    draw = random.Random(0)
    for _ in range(200):
        start = draw.randrange(len(whole))
        count = draw.randrange(len(whole) - start + 1)
        ids = corpus.tokens(start, count)
        assert ids.dtype == np.int64 and np.array_equal(ids, whole[start : start + count])


def test_tokens_outlive_the_corpus(whole_corpus):
    corpus = Corpus.open(whole_corpus, "train", VOCAB_SIZE)
    ids = corpus.tokens(0, 100)
    expected = ids.tolist()
    del corpus
    assert ids.tolist() == expected


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, -1), (0, 10**9), (10**9, 1)])
def test_tokens_outside_the_split_are_refused(whole_corpus, start, count):
    with pytest.raises(ValueError, match=r"train\.bin"):
        Corpus.open(whole_corpus, "train", VOCAB_SIZE).tokens(start, count)


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "tokenizer.model"])
def test_missing_empty_and_truncated_files_are_refused(corpus_folder, name):
    path = corpus_folder / name
    content = path.read_bytes()
    for kept in (len(content) - 1, len(content) // 2, 1, 0):
        path.write_bytes(content[:kept])
        refused(corpus_folder, name)
    path.unlink()
    refused(corpus_folder, f"{name} is missing")
    path.mkdir()
    refused(corpus_folder, name)


def test_an_absent_folder_or_split_is_refused(corpus_folder, tmp_path):
    refused(tmp_path / "absent", "no corpus in")
    refused(corpus_folder / "train.bin", "no corpus in")
    manifest = json.loads((corpus_folder / "manifest.json").read_text())
    del manifest["splits"]["valid"]
    (corpus_folder / "manifest.json").write_text(json.dumps(manifest))
    refused(corpus_folder, "has no valid split", split="valid")


def test_another_tokenizer_is_refused(corpus_folder):
    (corpus_folder / "tokenizer.model").write_bytes(train_tokenizer(["other text"] * 9, 270))
    refused(corpus_folder, "is not the tokenizer that the corpus was made with")


def test_ids_not_below_the_vocabulary_are_refused(whole_corpus):
    largest = Corpus.open(whole_corpus, "train", VOCAB_SIZE).max_id
    Corpus.open(whole_corpus, "train", largest + 1)
    refused(
        whole_corpus,
        rf"train.bin has id {largest}, .* vocabulary of {largest} \(model.vocab_size\)",
        vocab_size=largest,
    )


def test_an_id_that_the_manifest_hides_is_refused_when_it_is_read(corpus_folder):
    ids = np.memmap(corpus_folder / "train.bin", dtype=np.uint16, mode="r+")
    ids[37] = 60000
    ids.flush()
    corpus = Corpus.open(corpus_folder, "train", VOCAB_SIZE)
    assert len(corpus.tokens(0, 37)) == 37
    with pytest.raises(UserError, match=r"train\.bin has id 60000 at token 37"):
        corpus.tokens(30, 20)
    reader = BatchReader([Part(corpus)], sequence_length=corpus.num_tokens - 1, global_batch_size=1, seed=0)
    with pytest.raises(UserError, match=r"train\.bin has id 60000 at token 37"):
        reader.batch(1, [0])


def test_verify_finds_one_flipped_bit(corpus_folder):
    corpus = Corpus.open(corpus_folder, "train", VOCAB_SIZE)
    corpus.verify()
    content = bytearray((corpus_folder / "train.bin").read_bytes())
    content[100] ^= 1
    (corpus_folder / "train.bin").write_bytes(content)
    with pytest.raises(UserError, match=rf"train\.bin was altered within bytes 0 to {len(content)}: its SHA-256"):
        corpus.verify()
    (corpus_folder / "train.bin").unlink()
    with pytest.raises(UserError, match=r"cannot read .*train\.bin"):
        corpus.verify()


def test_an_alteration_is_told_by_its_block(whole_corpus, corpus_folder, monkeypatch):
    for module in ("journal", "corpus"):
        monkeypatch.setattr(f"slope_dist.data.{module}.BLOCK_BYTES", 100)
    path = corpus_folder / "manifest.json"
    manifest = json.loads(path.read_text())
    content = (corpus_folder / "train.bin").read_bytes()
    manifest["splits"]["train"]["bin_blocks_sha256"] = blocks_sha256(corpus_folder / "train.bin")
    path.write_text(json.dumps(manifest))
    for place, where in ((250, "200 to 300"), (len(content) - 1, f"{len(content) - len(content) % 100} to")):
        altered = bytearray(content)
        altered[place] ^= 1
        (corpus_folder / "train.bin").write_bytes(altered)
        with pytest.raises(UserError, match=f"was altered within bytes {where}"):
            Corpus.open(corpus_folder, "train", VOCAB_SIZE).verify()
    # Of a manifest without them, or with nonsense, the file alone is named.
    for nonsense in (None, [], "x"):
        manifest["splits"]["train"]["bin_blocks_sha256"] = nonsense
        path.write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="was altered"):
            Corpus.open(corpus_folder, "train", VOCAB_SIZE).verify()


BAD_MANIFESTS = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "deep": lambda text: "[" * 200_000,
    "another format": lambda text: text.replace('"format": 1', '"format": 2'),
    "no hash": lambda text: text.replace("tokenizer_sha256", "sha256"),
    "a string for a number": lambda text: text.replace('"max_id": ', '"max_id": "1", "x": '),
    "another dtype": lambda text: text.replace('"uint16"', '"int16"'),
    "other counts": lambda text: text.replace('"tokens": ', '"tokens": 1'),
    "other sizes": lambda text: text.replace('_bytes": ', '_bytes": 1'),
}


@pytest.mark.parametrize("damage", BAD_MANIFESTS)
def test_a_damaged_manifest_is_refused(corpus_folder, damage):
    path = corpus_folder / "manifest.json"
    path.write_text(BAD_MANIFESTS[damage](path.read_text()))
    refused(corpus_folder, "manifest")


def index_bytes(lengths, pointers=None, boundaries=None, *, code=8, version=1, sequences=None):
    """An index of uint16 sequences, right unless an argument says otherwise."""
    lengths = np.array(lengths, "<i4")
    if pointers is None:
        pointers = 2 * (np.cumsum(lengths) - lengths)
    if boundaries is None:
        boundaries = range(len(lengths) + 1)
    boundaries = np.array(boundaries, "<i8")
    count = len(lengths) if sequences is None else sequences
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", version, code, count, len(boundaries))
    return header + lengths.tobytes() + np.array(pointers, "<i8").tobytes() + boundaries.tobytes()


BAD_INDICES = {
    "no header": (b"MMIDIDX", "fewer than a header"),
    "another file": (b"x" * 100, "its first bytes are others"),
    "version 2": (index_bytes([3, 4], version=2), "version 2"),
    "a float dtype": (index_bytes([3, 4], code=7), "dtype code 7"),
    "an unknown dtype": (index_bytes([3, 4], code=99), "dtype code 99"),
    "2^63 sequences": (index_bytes([3, 4], sequences=2**63), "truncated or damaged"),
    "no document": (index_bytes([], boundaries=[0]), "holds no document"),
    "no boundary": (index_bytes([7], boundaries=[]), "holds no document"),
    "a negative length": (index_bytes([10, -3]), "gives sequence 1 a negative length -3"),
    "an offset outside": (
        index_bytes([3, 4], pointers=[0, 2**40]),
        "sequence 1 at byte 1099511627776, .* make 6",
    ),
    "a negative offset": (index_bytes([3, 4], pointers=[-2, 6]), "puts sequence 0 at byte -2"),
    "overlap": (index_bytes([3, 4], pointers=[0, 0]), "puts sequence 1 at byte 0"),
    "boundaries out of order": (
        index_bytes([3, 4], boundaries=[0, 2, 1, 2]),
        "boundary 2 at sequence 1, out of order",
    ),
    "boundaries not from 0": (
        index_bytes([3, 4], boundaries=[1, 2]),
        "boundary 0 at sequence 1, out",
    ),
    "boundaries short": (index_bytes([3, 4], boundaries=[0, 1]), "ends its last document"),
    "more than the .bin": (index_bytes([3, 5]), "has 14 bytes where its index says 16"),
    "less than the .bin": (index_bytes([3, 3]), "has 14 bytes where its index says 12"),
    "wrapping lengths": (index_bytes([2**31 - 1] * 3 + [14]), "index says"),
}


@pytest.mark.parametrize("chunk", [1, 1 << 20], ids=["in many chunks", "in one chunk"])
@pytest.mark.parametrize("damage", BAD_INDICES)
def test_a_damaged_index_is_refused(tmp_path, monkeypatch, damage, chunk):
    monkeypatch.setattr("slope_dist.data.index._CHUNK", chunk)
    content, message = BAD_INDICES[damage]
    (tmp_path / "train.idx").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_index(tmp_path / "train.idx", 14)
    assert "train." in str(caught.value)


@pytest.mark.parametrize("chunk", [1, 2, 1 << 20])
def test_a_right_index_is_read(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("slope_dist.data.index._CHUNK", chunk)
    (tmp_path / "train.idx").write_bytes(index_bytes([3, 4]))
    index = read_index(tmp_path / "train.idx", 14)
    assert (index.dtype, index.documents, index.tokens) == (np.uint16, 2, 7)


@pytest.mark.parametrize("with_manifest", [True, False], ids=["prepared here", "made elsewhere"])
def test_no_garbled_index_gives_other_tokens(corpus_folder, with_manifest):
    """1,250 seeded changes: each is refused, or the tokens are those of the right index."""
    if not with_manifest:
        (corpus_folder / "manifest.json").unlink()
    corpus = Corpus.open(corpus_folder, "train", VOCAB_SIZE)
    right = corpus.tokens(0, corpus.num_tokens)
    path = corpus_folder / "train.idx"
    content = path.read_bytes()
    draw = random.Random(42)
    refusals = 0
    for _ in range(1250):
        garbled = bytearray(content)
        for _ in range(draw.choice([1, 1, 2, 8])):
            # Half of the changes hit the header, where they do most.
            place = draw.randrange(34) if draw.random() < 0.5 else draw.randrange(len(garbled))
            garbled[place] ^= 1 << draw.randrange(8)
        if draw.random() < 0.2:
            del garbled[draw.randrange(len(garbled)) :]
        path.write_bytes(garbled)
        try:
            opened = Corpus.open(corpus_folder, "train", VOCAB_SIZE)
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error)
        else:
            assert np.array_equal(opened.tokens(0, opened.num_tokens), right)
    assert refusals >= 1200


def test_a_corpus_made_elsewhere_is_scanned(corpus_folder, whole_corpus):
    (corpus_folder / "manifest.json").unlink()
    known = Corpus.open(whole_corpus, "train", VOCAB_SIZE)
    scanned = Corpus.open(corpus_folder, "train", VOCAB_SIZE)
    assert (known.has_manifest, scanned.has_manifest) == (True, False)
    assert scanned.max_id == known.max_id
    assert scanned.text_bytes == known.text_bytes
    refused(corpus_folder, r"train\.bin has id \d+ at token \d+", vocab_size=known.max_id)
    (corpus_folder / "tokenizer.model").unlink()
    bare = Corpus.open(corpus_folder, "train", VOCAB_SIZE)
    assert bare.text_bytes is bare.tokenizer is bare.end_of_document is None
    assert bare.bytes_of(torch.tensor([1])) is None
    with pytest.raises(UserError, match=r"no manifest\.json"):
        bare.verify()
    (corpus_folder / "tokenizer.model").write_bytes(train_tokenizer(["other text"] * 9, 270))
    refused(corpus_folder, "but its tokenizer .* has 270 ids")


def test_the_fingerprint_is_that_of_tokens_and_tokenizer(corpus_folder, whole_corpus, tmp_path):
    right = Corpus.open(whole_corpus, "train", VOCAB_SIZE)
    assert right.fingerprint == Corpus.open(whole_corpus, "valid", VOCAB_SIZE).fingerprint
    assert right.fingerprint == Corpus.open(corpus_folder, "train", VOCAB_SIZE).fingerprint
    assert right.tokenizer_sha256 == load_tokenizer(whole_corpus / "tokenizer.model").sha256
    for folder in (corpus_folder, shutil.copytree(corpus_folder, tmp_path / "altered")):
        (folder / "manifest.json").unlink()
    content = bytearray((tmp_path / "altered" / "train.bin").read_bytes())
    content[0] ^= 1
    (tmp_path / "altered" / "train.bin").write_bytes(content)
    prints = [Corpus.open(folder, "train", VOCAB_SIZE).fingerprint for folder in (corpus_folder, tmp_path / "altered")]
    assert prints[0] != prints[1]


def test_the_fingerprint_states_what_verify_compares(corpus_folder, whole_corpus):
    """An altered token keeps the fingerprint, so only `verify` can tell that the data are others."""
    content = bytearray((corpus_folder / "train.bin").read_bytes())
    content[0] ^= 1
    (corpus_folder / "train.bin").write_bytes(content)
    altered = Corpus.open(corpus_folder, "train", VOCAB_SIZE)
    assert altered.fingerprint == Corpus.open(whole_corpus, "train", VOCAB_SIZE).fingerprint
    with pytest.raises(UserError, match="was altered"):
        altered.verify()


@pytest.mark.parametrize("samples", [None, 3])
def test_bytes_of_the_labels_are_those_of_the_text(whole_corpus, samples):
    corpus = Corpus.open(whole_corpus, "valid", VOCAB_SIZE)
    length, ranks = 7, 2
    counted = 0
    for rank in range(ranks):
        for _, labels in evaluation_batches(
            corpus, sequence_length=length, micro_batch_size=4, data_ranks=ranks, data_rank=rank, samples=samples
        ):
            counted += corpus.bytes_of(labels)
    windows = (corpus.num_tokens - 1) // length if samples is None else samples
    # Without what no window has as a label: the first token and those behind the last window.
    head = corpus.tokens(0, 1)
    tail = corpus.tokens(windows * length + 1, corpus.num_tokens - windows * length - 1)
    missing = sum(len(corpus.tokenizer.decode(part[part != corpus.end_of_document]).encode()) for part in (head, tail))
    assert counted == corpus.text_bytes - missing > 0


def test_bytes_of_ignored_unknown_and_no_labels(whole_corpus):
    corpus = Corpus.open(whole_corpus, "train", VOCAB_SIZE)
    assert corpus.bytes_of(torch.full((2, 3), IGNORED_LABEL)) == corpus.bytes_of(torch.empty(0, dtype=torch.int64)) == 0
    assert corpus.bytes_of(torch.tensor([corpus.end_of_document])) == 0
    with pytest.raises(UserError, match=r"train\.bin has id 400, but its tokenizer .* has 400 ids"):
        corpus.bytes_of(torch.tensor([[5, 400]]))


def config_of(folder, **data):
    return Config.model_validate(
        {
            "run": {"seed": data.pop("seed", 1)},
            "model": {
                "hidden_size": 64,
                "num_layers": 1,
                "num_heads": 4,
                "ffn_size": 64,
                "vocab_size": data.pop("vocab_size", VOCAB_SIZE),
                "sequence_length": 16,
            },
            "data": {"folder": str(folder), "valid_fraction": 0.2} | data,
            "training": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "learning_rate": 1e-3},
        }
    )


def test_settings_that_an_existing_corpus_does_not_follow_are_named(corpus_folder, tokenizer_file, tmp_path):
    corpus = Corpus.open(corpus_folder, "train", VOCAB_SIZE)
    other = tmp_path / "other.model"
    other.write_bytes(train_tokenizer(["other text"] * 9, 270))
    for matching in ({}, {"tokenizer": str(tokenizer_file)}, {"vocab_size": 2 * VOCAB_SIZE}):
        assert corpus.differs_from(config_of(corpus_folder, **matching)) == []
    for change, expected in (
        ({"valid_fraction": 0.3}, "data.valid_fraction 0.3 does not apply: .* was split with 0.2$"),
        ({"seed": 2}, "run.seed 2 does not apply to the split .* was split with seed 1$"),
        ({"tokenizer": str(other)}, "data.tokenizer .*other.model does not apply: "),
        (
            {"tokenizer": str(tmp_path / "absent")},
            "data.tokenizer does not apply .cannot read tokenizer .*absent: No such file",
        ),
    ):
        (line,) = corpus.differs_from(config_of(corpus_folder, **change))
        assert re.match(expected, line), line
    lines = corpus.differs_from(config_of(corpus_folder, source="python-stdlib", vocab_size=512, seed=3))
    assert [line.split()[0] for line in lines] == ["run.seed", "data.source", "model.vocab_size"]
    (corpus_folder / "manifest.json").unlink()
    elsewhere = Corpus.open(corpus_folder, "train", VOCAB_SIZE)
    assert elsewhere.differs_from(config_of(corpus_folder, seed=2, valid_fraction=0.02)) == []
    lines = elsewhere.differs_from(config_of(corpus_folder, source="python-stdlib", valid_fraction=0.3))
    assert [line.partition(":")[0] for line in lines] == [
        'data.source "python-stdlib" does not apply',
        "data.valid_fraction 0.3 does not apply",
    ]
    # One pair of files is split by it.
    pair = Corpus.open(corpus_folder / "train", "train", VOCAB_SIZE, valid_fraction=0.3)
    assert pair.differs_from(config_of(corpus_folder / "train", valid_fraction=0.3)) == []
