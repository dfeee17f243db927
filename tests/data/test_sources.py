"""Claim: each file and row becomes the right document, in the same order each time, and bad ones are named.

python -m pytest tests/data/test_sources.py
"""

from __future__ import annotations

import json
import platform

import pytest

from slope_dist.data.sources import embedded_source, python_stdlib, text_files
from slope_dist.errors import UserError


def read(source):
    return [(document.name, document.text) for document, _ in source.documents()]


@pytest.fixture
def texts_folder(tmp_path):
    (tmp_path / "b.txt").write_bytes("\ufeffcrlf\r\nand é\n".encode())
    (tmp_path / "a.jsonl").write_text('{"text": "one", "body": "eins"}\n\n{"text": "", "body": "zwei"}')
    (tmp_path / "notes.md").write_text("ignored")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "c.txt").write_text("c")
    return tmp_path


DOCUMENTS = [
    ("a.jsonl:1", "one"),
    ("a.jsonl:3", ""),
    ("b.txt", "\ufeffcrlf\r\nand é\n"),
    ("deeper/c.txt", "c"),
]


def test_a_folder_gives_its_files_in_order(texts_folder):
    source = text_files([str(texts_folder)])
    assert read(source) == read(source) == DOCUMENTS
    assert source.description == {
        "kind": "files",
        "files": ["a.jsonl", "b.txt", "deeper/c.txt"],
        "field": "text",
    }
    on_disk = sum(path.stat().st_size for path in texts_folder.rglob("*.*") if path.suffix != ".md")
    assert source.num_bytes == on_disk


def test_folders_behind_links_are_entered_once(texts_folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "d.txt").write_text("d")
    (elsewhere / "back").symlink_to(texts_folder)
    # Before "deeper" in order of name, which is there without a link and keeps its own.
    (texts_folder / "a-link").symlink_to(texts_folder / "deeper")
    (texts_folder / "deeper" / "loop").symlink_to(texts_folder)
    (texts_folder / "deeper" / "link").symlink_to(elsewhere)
    (texts_folder / "twice").symlink_to(elsewhere)
    (texts_folder / "broken").symlink_to(texts_folder / "nowhere")
    assert read(text_files([str(texts_folder)])) == [*DOCUMENTS, ("twice/d.txt", "d")]


def test_files_globs_and_fields(texts_folder):
    name = str(texts_folder / "b.txt")
    assert read(text_files([name, str(texts_folder / "a.jsonl")], "body")) == [
        DOCUMENTS[2],
        ("a.jsonl:1", "eins"),
        ("a.jsonl:3", "zwei"),
    ]
    found = [name for name, _ in read(text_files([str(texts_folder / "**" / "*.txt")]))]
    assert sorted(found) == ["b.txt", "c.txt"]


def test_a_file_named_twice_is_read_once(texts_folder):
    name = str(texts_folder / "b.txt")
    assert read(text_files([name, str(texts_folder / "*.txt"), name])) == [DOCUMENTS[2]]
    assert read(text_files([str(texts_folder), name])) == DOCUMENTS


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("absent.txt", "absent.txt does not exist"),
        ("*.text", "matches no file"),
        ("notes.md", "is none of .txt, .txt.gz"),
        ("empty", "holds no file of .txt, .txt.gz"),
    ],
)
def test_inputs_that_give_nothing_are_named(texts_folder, given, message):
    (texts_folder / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        text_files([str(texts_folder / given)])


def test_no_input_is_refused():
    with pytest.raises(UserError, match="no input"):
        text_files([])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"text": "cut', "not a JSON object in UTF-8"),
        (b'{"text": "\xff"}', "not a JSON object in UTF-8"),
        (b'["text"]', "not a JSON object; a row looks like"),
        (b'{"body": "x"}', 'field "text" is missing'),
        (b'{"text": 5}', 'field "text" is not a string'),
        (b'{"text": null}', 'field "text" is not a string'),
        (b'{"text": "\\ud83d"}', "half a surrogate pair at character 0"),
        (b"[" * 200_000, "not a JSON object in UTF-8"),
    ],
    ids=["cut", "not UTF-8", "list", "missing", "number", "null", "surrogate", "deep"],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps({"text": "good"}).encode() + b"\n\n" + row + b"\n")
    with pytest.raises(UserError) as caught:
        read(text_files([str(path)]))
    assert str(caught.value).startswith(f"{path}:3: {message}")
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("schön".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.txt is not UTF-8 text: bad byte at offset 3"):
        read(text_files([str(path)]))


def test_the_standard_library_is_there_and_holds_no_tests_or_packages():
    source = python_stdlib()
    documents = dict(read(source))
    names = list(documents)
    assert names == sorted(names)
    assert {"os.py", "asyncio/events.py", "json/decoder.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert source.num_bytes == sum(len(text.encode()) for text in documents.values()) > 5_000_000
    assert source.description["python"] == platform.python_version()
    assert source.description["files"] == len(names)


def test_an_unknown_embedded_source_is_refused():
    with pytest.raises(UserError, match='no embedded source "wikipedia"; there is: python-stdlib'):
        embedded_source("wikipedia")
