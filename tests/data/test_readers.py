"""Claim: compressed files, parquet files and datasets give the documents that the plain text has; damage is told in a
line that names the file, and bad rows are refused, or left out and counted.

Run: pytest tests/data/test_readers.py
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from slope_dist.data.readers import ENDINGS
from slope_dist.data.sources import MOST_REASONS, Source, dataset, text_files
from slope_dist.errors import UserError

TEXTS = ["one", "", "zwei\n\u00e9 \u2581", "x" * 70_000, "five"]
ROWS = "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(TEXTS)).encode()
PACK = {
    ".gz": gzip.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


def texts(source: Source) -> list[str]:
    return [document.text for document, _ in source.documents()]


def bytes_read(source: Source) -> int:
    return sum(read for _, read in source.documents())


def write_parquet(path: Path, rows: list[object], column: str = "text") -> Path:
    parquet.write_table(pyarrow.table({"id": list(range(len(rows))), column: rows}), path, row_group_size=2)
    return path


@pytest.mark.parametrize("packing", PACK)
def test_compressed_rows_are_those_of_the_plain_file(packing: str, tmp_path: Path) -> None:
    plain, packed = tmp_path / "rows.jsonl", tmp_path / f"rows.jsonl{packing}"
    plain.write_bytes(ROWS)
    packed.write_bytes(PACK[packing](ROWS))
    source = text_files([str(packed)])
    assert texts(source) == texts(source) == texts(text_files([str(plain)])) == TEXTS
    assert next(document.name for document, _ in source.documents()) == f"rows.jsonl{packing}:1"
    assert bytes_read(source) <= source.num_bytes == packed.stat().st_size


@pytest.mark.parametrize("packing", PACK)
def test_a_compressed_text_is_one_document(packing: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(PACK[packing]("caf\u00e9\r\n".encode()))
    assert texts(text_files([str(tmp_path)])) == ["caf\u00e9\r\n"]


def test_parquet_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", TEXTS)
    source = text_files([str(path)])
    assert texts(source) == TEXTS
    assert [document.name for document, _ in source.documents()][-1] == "rows.parquet:5"
    assert bytes_read(source) == path.stat().st_size
    other = write_parquet(tmp_path / "other.parquet", TEXTS, "body")
    assert texts(text_files([str(other)], "body")) == TEXTS
    with pytest.raises(UserError, match=r'other.parquet has no column "text"; it has id, body: name one with --field'):
        texts(text_files([str(other)]))


@pytest.mark.parametrize("ending", [ending for ending in ENDINGS if ending != ".jsonl" and ending != ".txt"])
def test_damaged_files_are_named(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{ending}"
    if ending == ".parquet":
        write_parquet(path, TEXTS)
    else:
        path.write_bytes(PACK[Path(ending).suffix](ROWS))
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[: len(whole) // 2], b"", b"no such format" * 9):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=re.escape(str(path))) as caught:
            texts(text_files([str(path)]))
        assert "\n" not in str(caught.value)


BAD = ['{"text": 5}', '{"body": ""}', "[]", '{"text": "\\ud83d"}', "{"]


def test_bad_rows_are_left_out_and_counted_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(['{"text": "first"}', *BAD * 3, '{"text": "last"}']))
    source = text_files([str(path)], skip_bad_rows=True)
    for _ in range(2):
        assert texts(source) == ["first", "last"]
        assert source.rejections.count == 15 and len(source.rejections.reasons) == MOST_REASONS
    assert [reason.split(": ")[0] for reason in source.rejections.reasons[:2]] == [f"{path}:2", f"{path}:3"]
    with pytest.raises(UserError, match=re.escape(f"{path}:2: ")):
        texts(text_files([str(path)]))


def test_bad_rows_of_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", ["a", None, "c"])
    source = text_files([str(path)], skip_bad_rows=True)
    assert texts(source) == ["a", "c"]
    assert source.rejections.reasons == [
        f'{path}: row 2: field "text" is not a string; fix the row or name the field with --field'
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_datasets_from_disk(stream: bool, tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(5))})
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made, "test": made.select([0, 4])}).save_to_disk(str(tmp_path / "two"))
    assert texts(dataset(str(tmp_path / "one"), "train", stream=stream)) == TEXTS
    source = dataset(str(tmp_path / "two"), "test", stream=stream)
    assert texts(source) == texts(source) == ["one", "five"]
    assert [document.name for document, _ in source.documents()] == ["test:1", "test:2"]
    assert source.description == {"kind": "dataset", "name": "two", "split": "test", "field": "text"}
    with pytest.raises(UserError, match=r'has no split "valid"; it has train, test'):
        dataset(str(tmp_path / "two"), "valid", stream=stream)
    with pytest.raises(UserError, match=r'has no column "body"; it has text, id'):
        dataset(str(tmp_path / "two"), "test", "body", stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_datasets_that_datasets_itself_finds_in_a_folder(
    stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows").mkdir()
    write_parquet(tmp_path / "rows" / "train.parquet", TEXTS)
    assert texts(dataset(str(tmp_path / "rows"), "train", stream=stream)) == TEXTS


def test_a_dataset_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"cannot load dataset .*nothing, split train: ") as caught:
        dataset(str(tmp_path / "nothing"), "train")
    assert "\n" not in str(caught.value)


def test_hidden_names_are_read_by_their_ending_too(tmp_path: Path) -> None:
    (tmp_path / ".txt").write_text("dot")
    (tmp_path / ".jsonl.gz").write_bytes(gzip.compress(ROWS))
    assert sorted(texts(text_files([str(tmp_path)]))) == sorted(["dot", *TEXTS])


def test_a_parquet_string_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    bad = pyarrow.array([b"good", b"\xff\xfe", b"last"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": bad}), path)
    assert texts(text_files([str(path)], skip_bad_rows=True)) == ["good", "last"]
    with pytest.raises(UserError, match=r'row 2: field "text" is not UTF-8 \(byte 0\)'):
        texts(text_files([str(path)]))


def test_a_parquet_column_of_something_else_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", TEXTS)
    with pytest.raises(UserError, match='column "id" holds int64, not text'):
        texts(text_files([str(path)], "id"))


def test_a_stream_that_breaks_is_told_by_its_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n' * 3 + "{")
    with pytest.raises(UserError, match=r"cannot read dataset .*rows, train: row [0-9]+: ") as caught:
        texts(dataset(str(_moved(tmp_path)), "train", stream=True))
    assert "\n" not in str(caught.value)


def _moved(folder: Path) -> Path:
    """The folder's file in a folder called rows."""
    (folder / "rows").mkdir()
    (folder / "rows.jsonl").rename(folder / "rows" / "train.jsonl")
    return folder / "rows"


def test_other_columns_are_not_decoded(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"text": ["a"], "picture": [{"bytes": b"none", "path": None}]})
    made = made.cast_column("picture", datasets.Image())
    made.save_to_disk(str(tmp_path / "pictures"))
    for stream in (False, True):
        assert texts(dataset(str(tmp_path / "pictures"), "train", stream=stream)) == ["a"]


def test_the_size_is_that_of_the_split(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"text": ["abcd"] * 100})
    both = datasets.DatasetDict({"train": made, "test": made.select(range(10))})
    both.save_to_disk(str(tmp_path / "both"))
    train, test = (dataset(str(tmp_path / "both"), split).num_bytes for split in ("train", "test"))
    assert 400 <= train < 2000 and test < train / 5
    assert dataset(str(tmp_path / "both"), "train", stream=True).num_bytes == 0
    with pytest.raises(UserError, match='has no split "test"; it has train'):
        made.save_to_disk(str(tmp_path / "single"))
        dataset(str(tmp_path / "single"), "test")
