"""Claim: a model at rest becomes step 0 of a run: zeros that satisfy the pattern are kept to the bit, other weights are
pruned by magnitude, masters are the source's own numbers, and the loss is that of the model.

Run: pytest tests/training/test_beginning.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from slope_dist.config import derive
from slope_dist.data.corpus import Corpus
from slope_dist.data.tokenizer import Tokenizer
from slope_dist.errors import UserError
from slope_dist.export import open_model
from slope_dist.export.stored import forms_of
from slope_dist.sparse import CompressedMatrix, Pattern, codec, pruning
from slope_dist.training.beginning import begin_from
from slope_dist.training.build import build, layer_factory
from slope_dist.training.first_state import prune
from tests.models.twins import FORMS, random_model, twin_of
from tests.runs import VOCAB_SIZE, newest, read_all, relative, same_bits
from tests.training.beginnings import Altered, AsDense, begun, config_for, model_of, written

FORMS_OF_FILES = ("hf", "compressed", "slope")

SECOND = {
    "opt": "decoder.layers.1.fc1",
    "gpt2": "transformer.h.1.mlp.c_fc",
    "llama": "model.layers.1.mlp.up_proj",
    "mistral": "model.layers.1.mlp.up_proj",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_sparse_model_comes_back_to_the_bit(
    form: str, dtype: torch.dtype, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    sparse = model_of(form, tokenizer, dtype=dtype)
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    # A kept -0.0 behind pruned entries, and groups that keep less than they may.
    odd = sparse.dense(SECOND[sparse.model.family]).clone()
    odd[2, :8] = torch.tensor([0.0, -0.0, 3.0, 0.0, 0.0, 0.0, 0.0, -0.0])
    source = Altered(AsDense(sparse), f"{SECOND[sparse.model.family]}.weight.values", odd)
    lines = begin_from(source, config_for(sparse, tmp_path, corpus, precision=precision)).lines
    count = sum(form.pattern is not None for form in sparse.linears.values())
    assert f"{count} of {count} sparse layers satisfied their pattern and were kept exactly" in lines
    back = begun(tmp_path)
    assert back.dtype == dtype and back.shapes == sparse.shapes
    assert odd.signbit().any() and odd[2, :4].count_nonzero() == 1
    for name in sparse.linears:
        assert same_bits(back.dense(name), source.dense(name)), name
    for name in sparse.skeleton.others:
        assert same_bits(back.read(name), sparse.read(name)), name


@pytest.mark.parametrize("form", FORMS_OF_FILES)
def test_every_form_of_files_comes_back_to_the_bit(
    form: str, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    stored = model_of("gpt2", tokenizer, dtype=torch.bfloat16)
    written(stored, form, tmp_path / "made")
    begin_from(open_model(tmp_path / "made"), config_for(stored, tmp_path, corpus, precision="bf16"))
    written(stored, "hf", tmp_path / "before", tokenizer=False)
    written(begun(tmp_path), "hf", tmp_path / "after", tokenizer=False)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes(), name


@pytest.mark.parametrize(("form", "how"), [("hf", {}), ("compressed", {}), ("slope", {"prune_adapters": True})])
def test_adapters_of_every_form_of_files_can_be_merged(
    form: str, how: dict[str, bool], corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    stored = model_of("llama", tokenizer, adapters=True, rank=16)
    written(stored, form, tmp_path / "made", **how)
    made = open_model(tmp_path / "made")
    assert made.has_adapters and any(form.appended for form in made.linears.values()) == bool(how)
    begin_from(made, config_for(stored, tmp_path, corpus), merge_adapters=True)
    back = begun(tmp_path)
    for name, form_of_layer in back.linears.items():
        merged = made.merged(name)
        assert torch.equal(back.dense(name), best_two(merged) if form_of_layer.pattern else merged), name


def test_a_sparse_source_keeps_its_values_and_indices(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    sparse = model_of("opt", tokenizer)
    begin_from(sparse, config_for(sparse, tmp_path, corpus))
    back = begun(tmp_path)
    for name in sparse.shapes:
        assert same_bits(back.read(name), sparse.read(name)), name


def best_two(dense: Tensor) -> Tensor:
    """2:4 by sorting, the first of equals first."""
    groups = dense.double().abs().view(dense.shape[0], -1, 4)
    order = groups.sort(dim=2, descending=True, stable=True).indices[:, :, :2]
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order, True)
    return dense * kept.view(dense.shape)


def test_a_dense_model_is_pruned_by_magnitude(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    dense = model_of("opt", tokenizer, pattern=None)
    weight = dense.dense("decoder.layers.1.fc1").clone()
    weight[3, :8] = torch.tensor([1.0, -1.0, 1.0, 1.0, 0.5, -2.0, 0.5, 0.5])
    source = Altered(dense, "decoder.layers.1.fc1.weight.values", weight)
    first, *lines = begin_from(source, config_for(dense, tmp_path, corpus), merge_adapters=True).lines
    assert first == "there are no adapters to merge"
    back = begun(tmp_path)
    assert back.dense("decoder.layers.1.fc1")[3, :8].tolist() == [1.0, -1.0, 0.0, 0.0, 0.5, -2.0, 0.0, 0.0]
    lost = total = 0.0
    for name, form in back.linears.items():
        source = weight if name == "decoder.layers.1.fc1" else dense.dense(name)
        expected = best_two(source) if form.pattern else source
        assert torch.equal(back.dense(name), expected), name
        if form.pattern:
            lost += float((source - expected).double().square().sum())
            total += float(source.double().square().sum())
    count = sum(form.pattern is not None for form in back.linears.values())
    assert count == 15
    assert lines[0] == (
        f"{count} of {count} sparse layers were pruned by magnitude, once: {(lost / total) ** 0.5:.2%} of the norm of "
        "all is gone"
    )


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "2:8", "4:8"])
def test_pruning_keeps_what_satisfies_the_pattern_to_the_bit(pattern: str) -> None:
    shape = Pattern.parse(pattern)
    values = torch.randn(64, 256 * shape.n // shape.m)
    values[torch.rand_like(values) < 0.3] = 0.0
    values[torch.rand_like(values) < 0.3] = -0.0
    # Not less than what could stand for -0.0.
    values[torch.rand_like(values) < 0.2] = 2.0**-149
    mask = codec.mask_of(CompressedMatrix.prune(torch.rand(64, 256), shape).indices, shape)
    dense = torch.zeros(64, 256).masked_scatter_(mask, values)
    assert same_bits(prune(dense, shape).expand(), dense)
    # More zeros with a sign than there is room for: no other number makes room for them.
    assert torch.equal(prune(torch.where(dense == 0, -0.0, dense), shape).expand(), dense)
    torch.testing.assert_close(prune(dense.abs(), shape).indices, CompressedMatrix.prune(dense.abs(), shape).indices)


def test_the_config_decides_which_layers_are_sparse_and_how(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """From 2:4 a layer becomes dense, another 4:8, which holds it, another 2:8, which does not."""
    sparse = model_of("opt 350M", tokenizer)
    config = config_for(
        sparse,
        tmp_path,
        corpus,
        sparsity={
            "dense_layers": ["*.out_proj"],
            "layer_patterns": ["decoder.layers.2.*=4:8", "*.fc2=2:8"],
            "column_mask_interval": 3,
        },
    )
    factory = layer_factory(config, derive(config), adapters=False, device="meta")
    build(config, factory)
    found = {name: form.pattern for name, form in forms_of(sparse.skeleton, config).items()}
    assert found == factory.sparse | dict.fromkeys(factory.dense)
    lines = begin_from(sparse, config).lines
    assert lines[0].startswith("2 of 12 sparse layers were pruned") and lines[1].startswith("10 of 12 ")
    back = begun(tmp_path)
    masks = read_all(newest(tmp_path / "run"), "metadata")
    for name, form in back.linears.items():
        expected = sparse.dense(name)
        if form.pattern == Pattern(2, 8):
            expected = CompressedMatrix.prune(expected, Pattern(2, 8)).expand()
        assert torch.equal(back.dense(name), expected), name
        if form.pattern is not None:
            matrix = back.matrix(name)
            kept = pruning.column_mask(matrix.values, matrix.indices, form.pattern)
            assert torch.equal(codec.unpack_bits(masks[f"{name}.weight.column_mask"]), kept), name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_masters_are_the_numbers_of_the_source(
    precision: str, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    dense = model_of("llama", tokenizer, pattern=None)
    begin_from(dense, config_for(dense, tmp_path, corpus, precision=precision))
    back = begun(tmp_path)
    masters, weights = (read_all(newest(tmp_path / "run"), kind) for kind in ("master", "weight"))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert masters.keys() == weights.keys() and back.dtype == dtype
    for name, weight in weights.items():
        assert same_bits(weight, masters[name].to(dtype)), name
    for name, form in back.linears.items():
        values = masters[f"{name}.weight.values"]
        if form.pattern is None:
            assert same_bits(values, dense.dense(name)), name
        else:
            # Which are kept follows from the source, not from what rounding makes equal.
            matrix = CompressedMatrix(values, back.read(f"{name}.weight.indices"), form.pattern)
            assert torch.equal(matrix.expand(), best_two(dense.dense(name))), name


def test_adapters_are_merged_where_that_is_asked_for(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    stored = model_of("gpt2", tokenizer, adapters=True)
    config = config_for(stored, tmp_path, corpus)
    with pytest.raises(UserError, match=r"^memory has adapters, .* give --merge-adapters to add them into"):
        begin_from(stored, config)
    assert not (tmp_path / "run").exists()
    lines = begin_from(stored, config, merge_adapters=True).lines
    assert "the adapters were merged into the weights before these were pruned" in lines
    back = begun(tmp_path)
    assert not back.has_adapters
    for name, form in stored.linears.items():
        merged = stored.dense(name)
        if form.adapter_rank:
            up, down = (stored.read(f"{name}.adapter.{part}").double() for part in ("up", "down"))
            merged = best_two(merged + (up @ down / form.adapter_rank).float())
        # A pair of almost equal magnitudes may be rounded to the other order.
        differing = (back.dense(name) - merged).abs() > 1e-5
        assert differing.sum() <= 2, name


def test_rotary_positions_allow_shorter_samples(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    stored = model_of("mistral", tokenizer)
    begin_from(stored, config_for(stored, tmp_path, corpus, model={"sequence_length": 16}))
    assert begun(tmp_path).model.sequence_length == 16


@pytest.mark.parametrize("form_name", ["gpt2", "llama"])
def test_a_model_of_transformers_begins_with_the_loss_that_it_has_there(
    form_name: str, corpus: Path, tmp_path: Path
) -> None:
    form = FORMS[form_name]
    form = replace(form, shape=replace(form.shape, vocab_size=VOCAB_SIZE))
    twin = twin_of(random_model(form), form).eval()
    twin.save_pretrained(tmp_path / "made")  # type: ignore[operator]
    model = open_model(tmp_path / "made")
    config = config_for(model, tmp_path, corpus, sparsity={"pattern": "dense"})
    lines = begin_from(model, config).lines
    assert "no linear layer of this run is sparse: nothing was pruned" in lines
    found = newest(tmp_path / "run").scalars["fingerprint"]
    windows = Corpus.open(corpus, "valid", VOCAB_SIZE)
    length = form.shape.sequence_length
    tokens = torch.stack([torch.from_numpy(windows.tokens(at * length, length + 1)) for at in range(found["samples"])])
    with torch.inference_mode():
        logits = twin(tokens[:, :-1]).logits
    expected = float(functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
    assert relative(found["loss"], expected) <= 1e-6
    assert f"loss of the fixed batch: {expected:.4f}" in lines
