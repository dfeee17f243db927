"""Claim: whatever of our own form is damaged, or made by an enemy who has sealed it again, is refused in one line that
names the file.

Run: pytest tests/export/test_slope_damage.py
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slope_dist.errors import UserError
from slope_dist.export.slope import SlopeModel
from slope_dist.sparse import CompressedMatrix
from tests.export.damage import refusal
from tests.export.models import random_stored
from tests.export.slope_files import (
    DESCRIPTION,
    LAYER,
    TENSORS,
    TWO_FOUR,
    redescribe,
    reseal,
    written,
)
from tests.export.small_tokenizers import VOCAB_SIZE, small_tokenizer


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good model of three blocks, with adapters of which those of one layer are appended; no test changes it."""
    stored = random_stored("opt", adapters=True, vocab_size=VOCAB_SIZE, tokenizer=small_tokenizer("json"))
    down = stored._tensors[f"{LAYER}.adapter.down"]
    down.copy_(CompressedMatrix.prune(down, TWO_FOUR).expand())
    folder = tmp_path_factory.mktemp("good") / "model"
    opened, _ = written(stored, folder, tokenizer=True)
    assert [name for name, form in opened.linears.items() if form.appended] == [LAYER]
    return folder


@pytest.fixture
def spoilt(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "spoilt"))


@pytest.mark.parametrize("name", [TENSORS, DESCRIPTION, "tokenizer.json", "tokenizer_config.json"])
def test_a_cut_flipped_missing_or_other_file_is_refused(spoilt: Path, name: str) -> None:
    path = spoilt / name
    data = path.read_bytes()
    for size in (0, 7, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        assert str(path) in refusal(spoilt)
    for position in (0, 9, len(data) // 3, len(data) - 100, len(data) - 1):
        flipped = bytearray(data)
        flipped[position] ^= 4
        path.write_bytes(flipped)
        assert str(path) in refusal(spoilt)
    path.write_bytes(data + b"\0")
    assert str(path) in refusal(spoilt)
    path.unlink()
    path.mkdir()
    assert str(path) in refusal(spoilt)
    path.rmdir()
    # Without its description it is no model.
    assert str(spoilt if name == DESCRIPTION else path) in refusal(spoilt)


TENSOR_CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "without a tensor": (lambda all: all.pop(f"{LAYER}.bias"), "expected F32 \\[160\\], found no such tensor"),
    "with one more": (lambda all: all.update(odd=torch.ones(3)), "odd: expected only the tensors of its model"),
    "with another dtype": (
        lambda all: all.update({f"{LAYER}.bias": all[f"{LAYER}.bias"].half()}),
        "expected F32 \\[160\\], found F16 \\[160\\]",
    ),
    "with bytes for numbers": (
        lambda all: all.update({f"{LAYER}.bias": torch.ones(160, dtype=torch.uint8)}),
        "expected F32 \\[160\\], found U8 \\[160\\]",
    ),
    "with another shape": (
        lambda all: all.update({f"{LAYER}.weight.values": all[f"{LAYER}.weight.values"][:-4]}),
        "expected F32 \\[164, 32\\], found F32 \\[160, 32\\]",
    ),
    "with equal positions": (
        lambda all: all[f"{LAYER}.weight.indices"][150, 2].fill_(0b0100_0000),
        "row 150 of the metadata is not a valid 2:4 pattern",
    ),
    "with descending positions of the factor": (
        lambda all: all[f"{LAYER}.weight.indices"][163, 7].fill_(0b0001_0100),
        "row 163 of the metadata is not a valid 2:4 pattern",
    ),
    "with NaN": (lambda all: all["decoder.embed_tokens.weight"][5, 6].fill_(torch.nan), "expected finite numbers"),
    "with infinity": (lambda all: all[f"{LAYER}.weight.values"][0, 0].fill_(torch.inf), "expected finite numbers"),
}


@pytest.mark.parametrize("what", TENSOR_CHANGES)
def test_bad_tensors_that_are_vouched_for_are_refused(spoilt: Path, what: str) -> None:
    change, message = TENSOR_CHANGES[what]
    opened = SlopeModel(spoilt)
    tensors = {name: opened._tensors.read(name) for name in opened._tensors.entries}
    change(tensors)
    reseal(spoilt, tensors)
    text = refusal(spoilt)
    assert str(spoilt / TENSORS) in text
    assert re.search(message, text)


def _rename(new: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["files"].update({new: content["files"].pop(TENSORS)})


def _linear(name: str = LAYER, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["linears"].setdefault(name, {}).update(changes)


DESCRIPTIONS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "of format 2": (lambda content: content.update(format=2), "expected format 1, found 2"),
    "of no format": (lambda content: content.pop("format"), "expected format 1, found None"),
    "of format true": (lambda content: content.update(format=True), "format"),
    "with an unknown key": (lambda content: content.update(more=1), "more: Extra inputs"),
    "without linears": (lambda content: content.pop("linears"), "linears: Field required"),
    "of a file above": (_rename("../weights.safetensors"), "should match pattern"),
    "of a file anywhere": (_rename("/etc/weights.safetensors"), "should match pattern"),
    "of a hidden file": (_rename(".weights.safetensors"), "should match pattern"),
    "of a file with a line feed": (_rename("weights.safetensors\n"), "should match pattern"),
    "of a file with NUL": (_rename("weights\0.safetensors"), "should match pattern"),
    "without its tensors": (lambda content: content["files"].pop(TENSORS), "found no such tensor"),
    "of another width": (lambda content: content["model"].update(ffn_size=168), "expected F32 \\[168, 32\\]"),
    "of another depth": (lambda content: content["model"].update(num_layers=4), "layers\\.3.*expected one, found none"),
    "of a width that cannot be": (lambda content: content["model"].update(hidden_size=63), "hidden_size 63"),
    "of another family": (lambda content: content["model"].update(family="gpt2"), "embedding_size 64 has no"),
    "of an unknown family": (lambda content: content["model"].update(family="bert"), "model.family"),
    "of another dtype": (lambda content: content.update(dtype="BF16"), "expected BF16"),
    "of an unknown dtype": (lambda content: content.update(dtype="I8"), "dtype: "),
    "of a step before the first": (lambda content: content.update(step=-1), "step: "),
    "of a layer more": (_linear("odd\n", pattern=None, adapter_rank=0, appended=False), "expected none, found one"),
    "of a layer less": (lambda content: content["linears"].pop(LAYER), "expected one, found none"),
    "of a pattern that is none": (_linear(pattern="3:4"), "pattern"),
    "of a dense layer": (_linear(pattern=None, appended=False), "expected F32 \\[160, 64\\]"),
    "of another pattern": (_linear("decoder.layers.2.fc1", pattern="2:8"), "expected F32 \\[160, 16\\]"),
    "of a huge rank": (_linear(adapter_rank=2**40), "adapter_rank"),
    "of another rank": (_linear(adapter_rank=3), "found F32"),
    "of a factor that is not appended": (_linear(appended=False), "adapter.down: expected F32 \\[4, 64\\]|found F32"),
    "of a factor in a dense layer": (
        _linear("decoder.layers.0.self_attn.q_proj", appended=True),
        "expected an appended factor on a 2:4 weight",
    ),
    "of a number of text": (_linear(adapter_rank="4"), "adapter_rank"),
    "of tokenizer files that are not there": (
        lambda content: content["tokenizer"]["files"].append("merges.txt"),
        "tokenizer: expected",
    ),
    "of no tokenizer's file": (lambda content: content["tokenizer"].update(files=[TENSORS]), "tokenizer: expected"),
}


@pytest.mark.parametrize("what", DESCRIPTIONS)
def test_bad_descriptions_that_are_sealed_are_refused(spoilt: Path, what: str) -> None:
    change, message = DESCRIPTIONS[what]
    redescribe(spoilt, change)
    text = refusal(spoilt)
    assert str(spoilt) in text
    assert re.search(message, text), text


@pytest.mark.parametrize(
    "data", [b"", b"[1", b'{"format":1', b'{"format":1,"format":1', b'{"a":' * 100_000, b'{"a":NaN']
)
def test_what_is_sealed_but_no_description_is_refused(spoilt: Path, data: bytes) -> None:
    seal = hashlib.sha256(data).hexdigest().encode()
    (spoilt / DESCRIPTION).write_bytes(data + b',"sha256":"' + seal + b'"}\n')
    assert str(spoilt / DESCRIPTION) in refusal(spoilt)


def test_a_projection_with_an_adapter_is_refused(tmp_path: Path) -> None:
    written(random_stored("opt 350M"), tmp_path / "out")
    redescribe(tmp_path / "out", _linear("decoder.project_in", adapter_rank=4))
    assert "decoder.project_in: expected it dense" in refusal(tmp_path / "out")


def test_a_file_that_changes_after_it_was_opened_is_not_read(spoilt: Path) -> None:
    opened = SlopeModel(spoilt)
    path = spoilt / TENSORS
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: expected it to stay as it was"):
        opened.read(f"{LAYER}.bias")


def test_a_pipe_in_place_of_a_file_is_refused(spoilt: Path) -> None:
    (spoilt / TENSORS).unlink()
    os.mkfifo(spoilt / TENSORS)
    assert "expected a plain file" in refusal(spoilt)
