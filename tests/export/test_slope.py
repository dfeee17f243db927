"""Claim: our own form gives back, bit for bit, every model that is written in it, and its logits; a first factor that
is 2:4 becomes the last rows of its weight, with valid metadata, however many zeros it has; and whatever is damaged, or
made by an enemy who has sealed it again, is refused in one line that names the file.

Run: pytest tests/export/test_slope.py
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slope_dist.checkpoint.format import encode
from slope_dist.errors import UserError
from slope_dist.export import open_model
from slope_dist.export.options import Options
from slope_dist.export.slope import SlopeExport, SlopeModel, shapes_in_files
from slope_dist.export.stored import StoredModel
from slope_dist.export.tensor_files import Planned, write_file_of_tensors
from slope_dist.inference import InferenceModel
from slope_dist.inference.model import AppendedLinear, loss_in_layers
from slope_dist.sparse import CompressedMatrix, Pattern, codec
from slope_dist.transfer import Transfer
from tests.export.models import MemoryModel, random_stored
from tests.export.small_tokenizers import KINDS, VOCAB_SIZE, small_tokenizer
from tests.models.twins import FORMS, VOCAB
from tests.runs import distance, same_bits

DTYPES = (torch.float32, torch.bfloat16)
TENSORS, DESCRIPTION = "weights.safetensors", "slope.json"
TWO_FOUR = Pattern(2, 4)
LAYER = "decoder.layers.1.fc1"


def written(stored: StoredModel, folder: Path, **options: Any) -> tuple[SlopeModel, list[str]]:
    """A model written to `folder` and opened there, and what the writer had to say."""
    folder.mkdir()
    export = SlopeExport(stored, Options(**{"tokenizer": False} | options))
    said = export.write(folder, Transfer())
    size = (folder / TENSORS).stat().st_size
    header = 8 + int.from_bytes((folder / TENSORS).read_bytes()[:8], "little")
    assert size - header <= export.bytes
    opened = open_model(folder)
    assert isinstance(opened, SlopeModel)
    return opened, said


def assert_same(found: StoredModel, expected: StoredModel) -> None:
    """Every tensor, bit for bit, and all that is known of the model."""
    assert found.model == expected.model
    assert found.dtype == expected.dtype
    assert found.origin.step == expected.origin.step
    assert found.shapes == expected.shapes
    for name in expected.shapes:
        assert same_bits(found.read(name), expected.read(name)), name


def logits_of(stored: StoredModel) -> Tensor:
    tokens = torch.arange(2 * 31).view(2, 31) * 7 % VOCAB
    return InferenceModel(stored).logits(tokens)


def with_sparse_factors(stored: MemoryModel, *, holes: bool = False) -> MemoryModel:
    """The model with its first factors pruned 2:4; with `holes`, one group of each row keeps one entry, one none."""
    for name, form in stored.linears.items():
        if form.adapter_rank:
            down = stored._tensors[f"{name}.adapter.down"]
            down.copy_(CompressedMatrix.prune(down, TWO_FOUR).expand())
            if holes:
                down[:, :8] = 0.0
                down[:, 3] = 1.5
    return stored


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapters", [False, True], ids=["plain", "adapters"])
@pytest.mark.parametrize("form", FORMS)
def test_a_model_comes_back(form: str, adapters: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    stored = random_stored(form, adapters=adapters, dtype=dtype, rank=3)
    opened, said = written(stored, tmp_path / "out")
    assert_same(opened, stored)
    assert opened.linears == stored.linears
    assert len(said) == adapters
    assert torch.equal(logits_of(opened), logits_of(stored))
    name = next(name for name, form in stored.linears.items() if form.pattern)
    assert same_bits(opened.read(f"{name}.weight.values", 3, 11), stored.read(f"{name}.weight.values", 3, 11))
    assert same_bits(opened.matrix(name).expand(), stored.matrix(name).expand())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_sparse_factors_are_appended(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    stored = with_sparse_factors(random_stored(form, adapters=True, dtype=dtype, rank=3), holes=True)
    opened, said = written(stored, tmp_path / "out")
    assert said == []
    assert_same(opened, stored)
    layers = [name for name, form in stored.linears.items() if form.adapter_rank]
    for name in layers:
        assert opened.linears[name].appended
        both = opened.appended(name)
        codec.check(both.indices, TWO_FOUR)
        expected = torch.cat([stored.matrix(name).expand(), stored.read(f"{name}.adapter.down")])
        assert same_bits(both.expand(), expected)
        assert same_bits(opened.read(f"{name}.adapter.down", 1, 2), stored.read(f"{name}.adapter.down", 1, 2))
    assert not any("adapter.down" in name for name in opened._tensors.entries)

    ours = InferenceModel(opened)
    assert sum(isinstance(module, AppendedLinear) for module in ours.module.modules()) == len(layers)
    # The same sums in another order.
    bound = 1e-5 if dtype == torch.float32 else 0.05
    assert distance(logits_of(opened), logits_of(stored)) < bound
    tokens, labels = torch.arange(60).view(2, 30), torch.arange(1, 61).view(2, 30)
    assert loss_in_layers(opened, tokens, labels) == pytest.approx(loss_in_layers(stored, tokens, labels), rel=bound)


def test_factors_of_odd_ranks_are_appended(tmp_path: Path) -> None:
    for rank in (1, 2, 5, 8):
        stored = with_sparse_factors(random_stored("opt", adapters=True, rank=rank))
        opened, _ = written(stored, tmp_path / str(rank))
        assert opened.appended(LAYER).shape == (160 + rank, 64)
        assert distance(logits_of(opened), logits_of(stored)) < 1e-5


def test_pruned_factors_are_appended_and_said(tmp_path: Path) -> None:
    stored = random_stored("llama", adapters=True)
    opened, said = written(stored, tmp_path / "out", prune_adapters=True)
    lost = total = 0.0
    for name, form in stored.linears.items():
        if form.adapter_rank:
            down, kept = stored.read(f"{name}.adapter.down"), opened.read(f"{name}.adapter.down")
            lost += float((down - kept).square().sum())
            total += float(down.square().sum())
            groups = down.view(4, -1, 4).abs().sort(dim=2).values
            assert torch.equal(kept.view(4, -1, 4).abs().sort(dim=2).values[:, :, 2:], groups[:, :, 2:])
    (line,) = said
    assert "changes the model" in line
    (number,) = re.findall(r"0\.\d+", line)
    assert float(number) == pytest.approx((lost / total) ** 0.5, abs=1e-4)
    assert lost > 0.0
    assert distance(logits_of(opened), logits_of(with_sparse_factors(stored))) < 1e-5


def test_there_may_be_nothing_to_prune(tmp_path: Path) -> None:
    assert written(random_stored("opt"), tmp_path / "out", prune_adapters=True)[1] == ["there are no adapters to prune"]


@pytest.mark.parametrize("pattern", ["1:2", "2:8", "4:8", None])
def test_other_patterns_keep_their_adapters_beside(pattern: str | None, tmp_path: Path) -> None:
    stored = random_stored("opt", adapters=pattern is not None, pattern=pattern)
    if pattern is not None:
        with_sparse_factors(stored)
    opened, said = written(stored, tmp_path / "out", prune_adapters=pattern is not None)
    assert_same(opened, stored)
    assert opened.linears == stored.linears
    assert said == [] if pattern is None else "not 2:4" in said[0]
    assert torch.equal(logits_of(opened), logits_of(stored))


def test_what_was_read_is_written_the_same(tmp_path: Path) -> None:
    stored = with_sparse_factors(random_stored("gpt2", adapters=True), holes=True)
    first, _ = written(stored, tmp_path / "first")
    # A mask that no rule by magnitude would give again.
    name = "transformer.h.1.mlp.c_fc"
    again = first.appended(name)
    last = again.indices[-1:].clone()
    assert int(last[0, 1]) != 0xEE
    last[0, 1] = 0xEE
    changed = tmp_path / "changed"
    shutil.copytree(tmp_path / "first", changed)
    entries = {key: first._tensors.read(key) for key in shapes_in_files(first, first.linears)}
    entries[f"{name}.weight.indices"][-1:] = last
    reseal(changed, entries)
    second, said = written(SlopeModel(changed), tmp_path / "second")
    assert said == []
    assert (tmp_path / "second" / TENSORS).read_bytes() == (changed / TENSORS).read_bytes()
    assert second.origin.facts == {"source": {"form": "slope", "name": "changed"}}


def test_numbers_are_cast(tmp_path: Path) -> None:
    stored = with_sparse_factors(random_stored("mistral", adapters=True))
    opened, _ = written(stored, tmp_path / "out", dtype=torch.bfloat16)
    assert opened.dtype == torch.bfloat16
    for name in stored.shapes:
        expected = stored.read(name)
        assert same_bits(opened.read(name), expected.to(torch.bfloat16) if expected.is_floating_point() else expected)
    stored._tensors["model.layers.1.mlp.up_proj.weight.values"][4, 5] = 1e6
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight\.values: 1e\+06 is beyond .*float16"):
        written(stored, tmp_path / "half", dtype=torch.float16)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_comes_with_it(kind: str, tmp_path: Path) -> None:
    tokenizer = small_tokenizer(kind)
    stored = random_stored("opt", vocab_size=VOCAB_SIZE, tokenizer=tokenizer)
    opened, _ = written(stored, tmp_path / "out", tokenizer=True)
    # One of another model that has come up beside it is not looked at.
    if kind == "sentencepiece":
        (tmp_path / "out" / "tokenizer.json").write_bytes(small_tokenizer("json").model)
    assert opened.tokenizer().sha256 == tokenizer.sha256
    assert opened.tokenizer().encode("two of four").tolist() == tokenizer.encode("two of four").tolist()
    for name, data in tokenizer.files().items():
        assert (tmp_path / "out" / name).read_bytes() == data

    given = tmp_path / "given"
    given.mkdir()
    for name, data in tokenizer.files().items():
        (given / name).write_bytes(data)
    assert open_model(tmp_path / "out", given).tokenizer().sha256 == tokenizer.sha256
    other = small_tokenizer(next(each for each in KINDS if each != kind))
    (tmp_path / "other").mkdir()
    for name, data in other.files().items():
        (tmp_path / "other" / name).write_bytes(data)
    with pytest.raises(UserError, match="is not the tokenizer of"):
        open_model(tmp_path / "out", tmp_path / "other").tokenizer()
    bare, _ = written(stored, tmp_path / "bare")
    with pytest.raises(UserError, match="--tokenizer"):
        bare.tokenizer()
    assert open_model(tmp_path / "bare", given).tokenizer().sha256 == tokenizer.sha256


def test_a_missing_tokenizer_is_refused_before_anything_is_written() -> None:
    with pytest.raises(UserError, match="--tokenizer"):
        SlopeExport(random_stored("opt"), Options())


@pytest.mark.parametrize("pattern", ["2:4", "2:8", "4:8"])
def test_the_documented_reader_reads(pattern: str, tmp_path: Path) -> None:
    document = (Path(__file__).parents[2] / "docs" / "inference-formats.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    reader: dict[str, Any] = {}
    exec(code, reader)
    stored = random_stored("opt 350M", adapters=True, pattern=pattern, dtype=torch.bfloat16)
    # One of a 2:4 weight is appended.
    down = stored._tensors[f"{LAYER}.adapter.down"]
    down.copy_(CompressedMatrix.prune(down, TWO_FOUR).expand())
    opened, _ = written(stored, tmp_path / "out")
    assert opened.linears[LAYER].appended == (pattern == "2:4")
    for name in (LAYER, "decoder.layers.1.fc2", "decoder.layers.0.self_attn.q_proj"):
        weight, down = reader["read_slope"](tmp_path / "out", name)
        assert np.array_equal(weight, stored.dense(name).float().numpy())
        if stored.linears[name].adapter_rank:
            assert np.array_equal(down, stored.read(f"{name}.adapter.down").float().numpy())
        else:
            assert down is None


def reseal(
    folder: Path, tensors: dict[str, Tensor], change: Callable[[dict[str, Any]], object] = lambda _: None
) -> None:
    """Other tensors and another description in a folder, with the right sizes and hashes, as an enemy could."""
    (folder / TENSORS).unlink()
    sha256 = write_file_of_tensors(
        folder / TENSORS, [Planned.of(name, tensor) for name, tensor in tensors.items()], Transfer()
    )
    entry = {"bytes": (folder / TENSORS).stat().st_size, "sha256": sha256}
    redescribe(folder, lambda content: content["files"].update({TENSORS: entry}))


def redescribe(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another description, sealed."""
    content = json.loads((folder / DESCRIPTION).read_bytes())
    del content["sha256"]
    change(content)
    (folder / DESCRIPTION).write_bytes(encode(content))


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


def refusal(folder: Path) -> str:
    """The one line with which a model is refused: when it is opened, or when all of it is read."""
    with pytest.raises(UserError) as caught:
        InferenceModel(open_model(folder))
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 600
    return text


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
