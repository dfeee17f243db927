"""Claim: whatever is wrong with a row or a file, the answer is a line that says where, or a corpus of the rows that are
right: 2,500 damaged rows and files from fixed seeds, plain, .gz and .zst.

    python -m pytest tests/data/test_damage.py
"""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow
import pytest

from slope_dist.data.jobs import Encode, RowOptions
from slope_dist.data.readers import Document, Lines
from slope_dist.data.sources import Source, text_files
from slope_dist.errors import UserError

PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}
ROWS, FILES = 1602, 300
"""Damaged rows, and damaged files of each packing."""

ODD = [
    b"", b" ", b"\0", b"null", b"true", b"NaN", b"1e999", b"-", b"{}", b"[]", b'""', b'{"text"}', b'{"text":}',
    b"{'text': 'x'}", b'{"text": NaN}', b'{"text": [1]}', b'{"text": {}}', b'{"text": true}',
    b'{"text": "\\ud800"}', b'{"text": "\\u00"}', b'{"text": "a", "text": 5}', b'{"Text": "a"}',
    b'{"text": "a"} {"text": "b"}', b'\xef\xbb\xbf{"text": "bom"}', b'\xff\xfe{\0', b"[" * 5000,
    b'{"text":' * 5000, b'{"text": ' + b"9" * 5000 + b"}",
]  # fmt: skip


def damaged(data: bytes, draw: random.Random) -> bytes:
    """The bytes with one to eight changes: flipped, cut, doubled, replaced, or others put between."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        place = draw.randrange(len(changed) + 1)
        kind = draw.randrange(6)
        if kind == 0:
            del changed[place:]
        elif kind == 1:
            del changed[place : place + draw.randrange(1, 20)]
        elif kind == 2:
            changed[place:place] = draw.choice(ODD)
        elif kind == 3:
            changed[place:place] = changed[: draw.randrange(len(changed) + 1)]
        elif kind == 4:
            changed[place:place] = draw.randbytes(draw.randrange(1, 9))
        elif place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
    return bytes(changed)


def row(number: int, draw: random.Random) -> bytes:
    text = "".join(draw.choices('the sparse weight\t\u00e9\u2581\U0001f600\n"\\', k=draw.randrange(60)))
    return json.dumps(
        {"id": number, "text": text, "more": [None, {"a": 1.5}]}, ensure_ascii=draw.random() < 0.5
    ).encode()


def outcome(source: Source) -> list[Document] | str:
    """The documents of a source, or its one line of error."""
    try:
        return [document for document, _ in source.documents()]
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return str(error)


@pytest.mark.parametrize("packing", PACK)
def test_damaged_rows_are_left_out_and_the_others_stay(packing: str, tmp_path: Path, tokenizer) -> None:
    draw = random.Random(f"rows{packing}")
    path = tmp_path / f"rows.jsonl{packing}"
    count = ROWS // len(PACK)
    rows = []
    for number in range(count):
        bad = draw.choice(ODD) if draw.random() < 0.2 else damaged(row(number, draw), draw)
        rows += [bad.replace(b"\n", b"\r"), row(number, draw)]
    path.write_bytes(PACK[packing](b"\n".join(rows)))
    source = text_files([str(path)], skip_bad_rows=True)
    documents = outcome(source)
    assert isinstance(documents, list)
    names = {document.name for document in documents}
    assert {f"{path.name}:{number}" for number in range(2, 2 * count + 1, 2)} <= names
    blank = sum(not bad.strip() for bad in rows)
    assert len(documents) + source.rejections.count == len(rows) - blank
    assert source.rejections.count > count / 2
    # What workers make of the rows is the same: as many are left out, and every text reads back.
    encode = Encode(tokenizer, "", RowOptions(seed=0, valid_fraction=0.5, skip_bad_rows=True))
    facts = encode([item for item, _ in source.items()]).facts
    assert facts["error"] is None and facts["rejected"] == len(rows) - blank - len(documents)
    written = sum(counts["documents"] for counts in facts["splits"].values())
    assert written + facts["without_text"] == len(documents)
    first = outcome(text_files([str(path)]))
    assert isinstance(first, str) and first.startswith(f"{path}:") and first == facts["reasons"][0]


@pytest.mark.parametrize("packing", PACK)
def test_damaged_files_are_named_or_read(packing: str, tmp_path: Path) -> None:
    draw = random.Random(f"files{packing}")
    path = tmp_path / f"rows.jsonl{packing}"
    whole = PACK[packing](b"\n".join(row(number, draw) for number in range(30)))
    refused = 0
    for _ in range(FILES):
        path.write_bytes(damaged(whole, draw))
        for skip in (True, False):
            found = outcome(text_files([str(path)], skip_bad_rows=skip))
            refused += isinstance(found, str)
            assert not isinstance(found, str) or str(path) in found
    assert refused > FILES / 4


def test_lines_are_the_same_wherever_a_file_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(1)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(damaged(row(number, draw), draw) for number in range(200)))
    expected = outcome(text_files([str(path)], skip_bad_rows=True))
    for size in (1, 7, 1000):
        monkeypatch.setattr("slope_dist.data.readers._BYTES_AT_ONCE", size)
        source = text_files([str(path)], skip_bad_rows=True)
        assert outcome(source) == expected
        lines = [item for item, _ in source.items() if isinstance(item, Lines)]
        assert b"".join(item.data for item in lines) == path.read_bytes()
