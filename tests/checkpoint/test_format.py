"""Claim: a manifest comes back as it was written, no single flipped bit or cut of it passes, and a manifest with a
right hash but hostile or inconsistent content is refused with one line, without touching any file. The reader printed
in docs/checkpoint-format.md reads what several ranks wrote.

Run alone: python -m pytest tests/checkpoint/test_format.py
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slope_dist.checkpoint.format import (
    CheckpointError,
    check_content,
    decode,
    dtype_name,
    encode,
    folder_name,
    step_of,
)

from .states import in_ranks, make_state, save_state

WEIGHTS, OPTIMIZER = "rank-00000.weights.safetensors", "rank-00000.optimizer.safetensors"


def good_content() -> dict[str, Any]:
    def fragment(file: str, key: str, columns: tuple[int, int]) -> dict[str, Any]:
        rectangle = [[0, 4], list(columns)]
        return {"file": file, "key": key, "rectangle": rectangle, "start": 0, "stop": 4 * (columns[1] - columns[0])}

    return {
        "format": 1,
        "step": 7,
        "scalars": {"loss_scale": 65536.0, "rate": 0.1 + 0.2, "text": "é\n\u2028"},
        "identity": {"seed": 1},
        "config": {"training": {"steps": 10}},
        "versions": {"torch": "2"},
        "files": {WEIGHTS: {"bytes": 1000, "sha256": "0" * 64}, OPTIMIZER: {"bytes": 2000, "sha256": "f" * 64}},
        "tensors": {
            "weight/a.b": {
                "shape": [4, 8],
                "dtype": "BF16",
                "fragments": [fragment(WEIGHTS, "x", (0, 4)), fragment(WEIGHTS, "y", (4, 8))],
            },
            "master/a.b": {"shape": [4, 8], "dtype": "F32", "fragments": [fragment(OPTIMIZER, "x", (0, 8))]},
        },
    }


def test_round_trip_is_exact() -> None:
    content = good_content()
    data = encode(content)
    manifest = decode(data)
    check_content(content)
    assert json.loads(manifest.model_dump_json()) == content
    assert manifest.scalars["rate"] == 0.1 + 0.2
    # What the documentation tells a stranger: one JSON object, hashed up to its last member.
    assert json.loads(data) == {**content, "sha256": hashlib.sha256(data[:-78]).hexdigest()}


def test_every_flipped_bit_and_every_cut_is_found() -> None:
    data = encode(good_content())
    for position in range(len(data)):
        for bit in range(8):
            spoilt = bytearray(data)
            spoilt[position] ^= 1 << bit
            with pytest.raises(ValueError, match="sha256"):
                decode(bytes(spoilt))
    for length in range(len(data)):
        with pytest.raises(ValueError, match="sha256"):
            decode(data[:length])
    with pytest.raises(ValueError, match="sha256"):
        decode(data + b"\n")


def test_the_documented_reader_reads(tmp_path: Path) -> None:
    document = (Path(__file__).parents[2] / "docs" / "checkpoint-format.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    reader: dict[str, Any] = {}
    exec(code, reader)
    assert in_ranks(lambda: save_state(tmp_path / "checkpoints", 4), 3, tmp_path) == [0, 0, 0]
    folder = tmp_path / "checkpoints" / folder_name(4)
    manifest = reader["read_manifest"](folder)
    assert manifest["step"] == 4
    for (name, kind), tensor in make_state(4).items():
        expected = bytes(tensor.reshape(-1).view(torch.uint8).numpy())
        assert reader["read_tensor"](folder, manifest, f"{kind}/{name}") == expected


def _rename_file(name: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["files"][name] = content["files"].pop(WEIGHTS)
        for fragment in content["tensors"]["weight/a.b"]["fragments"]:
            fragment["file"] = name

    return change


def _set(value: Any, *path: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


def _rename_tensor(name: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["tensors"][name] = content["tensors"].pop("weight/a.b")

    return change


FRAGMENT = ("tensors", "weight/a.b", "fragments", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename_file("../rank-00000.weights.safetensors"), "pattern"),
        (_rename_file("/etc/rank-00000.weights.safetensors"), "pattern"),
        (_rename_file("a/rank-00000.weights.safetensors"), "pattern"),
        (_rename_file(".."), "pattern"),
        (_rename_file(""), "pattern"),
        (_rename_file("manifest.json"), "pattern"),
        (_rename_file("rank-00000.weights.safetensors\n"), "pattern"),
        (_rename_file("rank-00000.weights.safetensors\x00"), "pattern"),
        (_rename_file("rank-00000.weights.pt"), "pattern"),
        (_rename_tensor("weight/../a"), "pattern"),
        (_rename_tensor("weight/a b"), "pattern"),
        (_rename_tensor("pickle/a.b"), "pattern"),
        (_set("../x.safetensors", *FRAGMENT, "file"), "not among the files"),
        (_set("rank-00001.weights.safetensors", *FRAGMENT, "file"), "not among the files"),
        (_set("x", *FRAGMENT, "key"), "used twice"),
        (_set([[0, 4], [3, 7]], *FRAGMENT, "rectangle"), "overlap"),
        (_set([[0, 4], [5, 9]], *FRAGMENT, "rectangle"), "inside the shape"),
        (_set([[0, 4], [8, 4]], *FRAGMENT, "rectangle"), "inside the shape"),
        (_set([[0, 16]], *FRAGMENT, "rectangle"), "inside the shape"),
        (_set([[-4, 0], [4, 8]], *FRAGMENT, "rectangle"), "greater than or equal to 0"),
        (_set([[0, 4], [4, 2**70]], *FRAGMENT, "rectangle"), "inside the shape"),
        (_set(1, *FRAGMENT, "start"), "missing"),
        (_set(15, *FRAGMENT, "stop"), "missing"),
        (_set(17, *FRAGMENT, "stop"), "not a range"),
        (_set(True, *FRAGMENT, "start"), "integer"),
        (_set(0.0, *FRAGMENT, "start"), "integer"),
        (_set("0", *FRAGMENT, "start"), "integer"),
        (_set([4, 9], "tensors", "weight/a.b", "shape"), "missing"),
        (_set([], "tensors", "weight/a.b", "fragments"), "missing"),
        (_set("O", "tensors", "weight/a.b", "dtype"), "BF16"),
        (_set({}, "tensors"), "at least 1"),
        (_set(2, "format"), "expected format 1, found 2"),
        (_set("x" * 5000, "format"), "expected format 1"),
        (_set(-1, "step"), "greater than or equal to 0"),
        (_set("7", "step"), "integer"),
        (_set([], "scalars"), "dictionary"),
        (_set(1, "surprise"), "surprise"),
        (_set("0" * 63, "files", WEIGHTS, "sha256"), "pattern"),
        (_set({"bytes": 1, "sha256": "0" * 64}, "files", "rank-00009.weights.safetensors"), "no tensor"),
    ],
)
def test_bad_content_with_a_right_hash_is_refused(change: Callable[[dict[str, Any]], None], message: str) -> None:
    content = copy.deepcopy(good_content())
    change(content)
    with pytest.raises(ValueError, match=message) as read:
        decode(encode(content))
    with pytest.raises(ValueError, match=message) as written:
        check_content(content)
    assert str(written.value) == str(read.value), "what is written is checked as what is read"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{" * 200_000, "depth|JSON"),
        (b'{"a":' + b"[" * 200_000, "depth|JSON"),
        (b'{"format":1,"format":1', "stands twice"),
        (b'{"format":' + b"1" * 5000, "JSON"),
        (b"[1", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"", "JSON"),
        (b'{"format":1', "Field required"),
    ],
)
def test_bad_text_with_a_right_hash_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(body + b',"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n')


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, torch.zeros(1)])
def test_what_is_not_json_is_not_written(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        encode({**good_content(), "scalars": {"x": value}})


def test_names_of_folders() -> None:
    assert folder_name(123) == "step-00000123"
    for step in (0, 7, 99_999_999, 123_456_789_012):
        assert step_of(folder_name(step)) == step
    for name in (
        "step-1",
        "step-000000001",
        "old-step-00000001",
        "step-00000001-bak",
        "step-00000001\n",
        "step-00000001.tmp-" + "0" * 32,
        "step-" + "9" * 5000,
    ):
        assert step_of(name) is None


def test_errors_are_one_line_of_moderate_length() -> None:
    text = str(CheckpointError("a\nb\x1b[31m\u2028" + "x" * 10_000))
    assert text.isprintable() and text.startswith("a b") and len(text) <= 1000


def test_other_dtypes_are_refused_by_name() -> None:
    assert dtype_name(torch.bfloat16) == "BF16"
    with pytest.raises(ValueError, match=r"torch\.complex64"):
        dtype_name(torch.complex64)
