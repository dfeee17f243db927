"""Claim: our own form gives back, bit for bit, every model that is written in it, and its logits; a first factor that
is 2:4 becomes the last rows of its weight, with valid metadata, however many zeros it has.

Run: pytest tests/export/test_slope.py
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slope_dist.errors import UserError
from slope_dist.export import open_model
from slope_dist.export.exporting import export_of
from slope_dist.export.options import Options
from slope_dist.export.proof import WrongExportError, check_same
from slope_dist.export.slope import SlopeExport, SlopeModel, shapes_in_files
from slope_dist.export.stored import StoredModel
from slope_dist.inference import InferenceModel
from slope_dist.inference.model import AppendedLinear, loss_in_layers
from slope_dist.sparse import CompressedMatrix, codec
from slope_dist.transfer import Transfer
from tests.export.hugging_face import exported
from tests.export.models import random_stored
from tests.export.slope_files import (
    LAYER,
    TENSORS,
    TWO_FOUR,
    reseal,
    with_sparse_factors,
    written,
)
from tests.export.small_tokenizers import KINDS, VOCAB_SIZE, small_tokenizer
from tests.models.twins import FORMS, VOCAB
from tests.runs import distance, same_bits

DTYPES = (torch.float32, torch.bfloat16)


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
    # Of normal numbers, as docs/inference-formats.md says.
    assert float(number) == pytest.approx(0.36, abs=0.02)
    assert distance(logits_of(opened), logits_of(with_sparse_factors(stored))) < 1e-5


def test_zeros_that_are_not_kept_have_no_sign(tmp_path: Path) -> None:
    stored = with_sparse_factors(random_stored("opt", adapters=True))
    down = stored._tensors[f"{LAYER}.adapter.down"]
    down.copy_(torch.where(down == 0.0, -0.0, down))
    opened, said = written(stored, tmp_path / "out")
    assert said == []
    found = opened.read(f"{LAYER}.adapter.down")
    assert torch.equal(found, down)
    assert not torch.signbit(found[found == 0.0]).any()
    check_same(stored, opened, Options(), Transfer())
    stored._tensors[f"{LAYER}.adapter.down"] = down * 1.001
    with pytest.raises(WrongExportError, match=re.escape(LAYER)):
        check_same(stored, SlopeModel(tmp_path / "out"), Options(), Transfer())


def test_there_may_be_nothing_to_prune(tmp_path: Path) -> None:
    assert written(random_stored("opt"), tmp_path / "out", prune_adapters=True)[1] == ["there are no adapters to prune"]


@pytest.mark.parametrize("pattern", ["1:2", "2:8", "4:8", None])
def test_other_patterns_keep_their_adapters_beside(pattern: str | None, tmp_path: Path) -> None:
    stored = random_stored("opt", adapters=pattern is not None, pattern=pattern)
    if pattern is not None:
        with_sparse_factors(stored)
    for prune in (False, True) if pattern else (False,):
        opened, (line,) = written(stored, tmp_path / str(prune), prune_adapters=prune)
        assert_same(opened, stored)
        assert opened.linears == stored.linears
        # Pruning would not help.
        expected = "15 adapters lie beside their weights, which are not 2:4" if pattern else "stored sparse in memory"
        assert expected in line
        assert torch.equal(logits_of(opened), logits_of(stored))


@pytest.mark.parametrize("form", ["slope", "compressed"])
def test_files_that_do_not_tell_sparse_weights_are_written_dense_and_that_is_said(form: str, tmp_path: Path) -> None:
    exported(random_stored("llama"), tmp_path / "hf")
    export = export_of(open_model(tmp_path / "hf"), form, Options(tokenizer=False))
    (tmp_path / "out").mkdir()
    *_, line = said = export.write(tmp_path / "out", Transfer())
    assert not any("random numbers" in each for each in said)
    assert line.startswith(f"no linear layer is stored sparse in {tmp_path / 'hf'}, so all are written dense; ")
    assert "\n" not in line
    assert not any(each.pattern for each in open_model(tmp_path / "out").linears.values())


def test_what_was_read_is_written_the_same(tmp_path: Path) -> None:
    stored = with_sparse_factors(random_stored("gpt2", adapters=True), holes=True)
    first, _ = written(stored, tmp_path / "first")
    # A mask that no rule by magnitude would give again.
    name = "transformer.h.1.mlp.c_fc"
    again = first.appended(name)
    last = again.indices[-1:].clone()
    assert int(last[0, 0]) != 0xEE
    last[0, 0] = 0xEE
    changed = tmp_path / "changed"
    shutil.copytree(tmp_path / "first", changed)
    entries = {key: first._tensors.read(key) for key in shapes_in_files(first, first.linears)}
    entries[f"{name}.weight.indices"][-1:] = last
    reseal(changed, entries)
    second, said = written(SlopeModel(changed), tmp_path / "second")
    assert said == []
    assert (tmp_path / "second" / TENSORS).read_bytes() == (changed / TENSORS).read_bytes()
    assert second._description.source.model_dump() == {"form": "slope", "name": "changed"}


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
    kept = opened._description.tokenizer
    assert kept is not None and kept.end_of_document == tokenizer.end_of_document
    kept = kept.model_copy(update={"end_of_document": tokenizer.end_of_document + 1})
    opened._description = opened._description.model_copy(update={"tokenizer": kept})
    with pytest.raises(UserError, match="ends a document with id"):
        opened.tokenizer()
    bare, _ = written(stored, tmp_path / "bare")
    with pytest.raises(UserError, match="--tokenizer"):
        bare.tokenizer()
    assert open_model(tmp_path / "bare", given).tokenizer().sha256 == tokenizer.sha256
    written(random_stored("opt"), tmp_path / "small")
    with pytest.raises(UserError, match=f"ids, and the model {VOCAB}"):
        open_model(tmp_path / "small", given).tokenizer()


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
