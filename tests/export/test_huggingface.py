"""A sparse model written in Hugging Face's form loads in transformers with no missing or unexpected tensor, and gives
the trainer's logits: within 1e-5 in fp32, within a few roundings of the dtype else. Pruned weights are explicit zeros.

Run: pytest tests/export/test_huggingface.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from slope_dist.config.model import ModelConfig
from slope_dist.data.sentencepiece_model import SentencePieceTokenizer, train_tokenizer
from slope_dist.errors import UserError
from slope_dist.export import stored as stored_module
from slope_dist.export.exporting import convert
from slope_dist.export.huggingface import HuggingFaceExport
from slope_dist.export.options import Options
from slope_dist.export.stored import StoredModel
from slope_dist.sparse import codec
from slope_dist.transfer import Transfer
from tests.export.hugging_face import EXACT, TOKENS, difference, exported, loaded, ours, relative, roundings, theirs
from tests.export.models import random_stored
from tests.models.twins import FORMS

SMALL = 100_000
"""Bytes of a shard, of which the models make several."""


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def weight_in(tensors: dict[str, Tensor], family: str, layer: str) -> Tensor:
    """The [O, I] of one of our linear layers in transformers' tensors, found without the code under test."""
    if family != "gpt2":
        return tensors[f"model.{layer}.weight" if family == "opt" else f"{layer}.weight"]
    if layer.endswith(("q_proj", "k_proj", "v_proj")):
        joined = tensors[f"{layer.rpartition('.')[0]}.c_attn.weight"].T
        return joined.chunk(3)["qkv".index(layer[-6])]
    return tensors[f"{layer}.weight"].T


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_transformers_gives_the_trainers_logits(form: str, adapters: bool, tmp_path: Path) -> None:
    stored = random_stored(form, adapters=adapters)
    lines = exported(stored, tmp_path / "hf", merge_adapters=adapters)
    with torch.inference_mode():
        trainers = stored.module.logits(TOKENS)
    found = theirs(loaded(tmp_path / "hf"))
    assert float(found.std()) > 1
    # A merged weight is rounded once more than the trainer's parts of it.
    bound = 2 * EXACT if adapters else EXACT
    assert difference(found, trainers) < bound
    assert difference(found, ours(stored)) < bound
    assert any("18" in line or "15" in line for line in lines if "sparsity is gone" in line) == adapters
    assert not (tmp_path / "hf" / "adapter").exists()


@pytest.mark.parametrize(("form", "dtype"), [*((form, torch.bfloat16) for form in FORMS), ("opt", torch.float16)])
def test_logits_in_half_precision_differ_by_roundings(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    stored = random_stored(form, dtype=dtype)
    exported(stored, tmp_path / "hf")
    model = loaded(tmp_path / "hf")
    assert model.dtype == dtype
    assert relative(theirs(model), ours(stored)) < roundings(dtype)


@pytest.mark.parametrize("form", FORMS)
def test_pruned_weights_are_explicit_zeros(form: str, tmp_path: Path) -> None:
    stored = random_stored(form)
    exported(stored, tmp_path / "hf")
    tensors = tensors_of(tmp_path / "hf")
    sparse = [name for name, linear in stored.linears.items() if linear.pattern is not None]
    assert len(sparse) == len(stored.linears) - 3 - 2 * (form == "opt 350M")
    for name in sparse:
        weight, matrix = weight_in(tensors, stored.model.family, name), stored.matrix(name)
        kept = codec.mask_of(matrix.indices, matrix.pattern)
        assert (weight[~kept] == 0).all()
        assert torch.equal(weight[kept], matrix.values.flatten())
        assert int((weight == 0).sum()) >= weight.numel() // 2
        # One kept weight is -0.0, and stays it.
        assert weight[kept].view(torch.int32).eq(torch.tensor(-0.0).view(torch.int32)).any()


@pytest.mark.parametrize("form", ["opt 350M", "gpt2", "llama"])
def test_shards_load_as_one_file_does(form: str, tmp_path: Path) -> None:
    stored = random_stored(form)
    exported(stored, tmp_path / "one")
    exported(stored, tmp_path / "several", SMALL)
    files = sorted(path.name for path in (tmp_path / "several").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    one, several = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "several")
    assert index["weight_map"].keys() == one.keys() == several.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    assert all(torch.equal(tensor, several[name]) for name, tensor in one.items())
    assert all(name in load_file(tmp_path / "several" / file) for name, file in index["weight_map"].items())
    assert difference(theirs(loaded(tmp_path / "several")), theirs(loaded(tmp_path / "one"))) == 0


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_numbers_are_cast_once(form: str, tmp_path: Path) -> None:
    stored = random_stored(form, adapters=True)
    exported(stored, tmp_path / "fp32", merge_adapters=True)
    exported(stored, tmp_path / "bf16", merge_adapters=True, dtype=torch.bfloat16)
    wide, narrow = tensors_of(tmp_path / "fp32"), tensors_of(tmp_path / "bf16")
    assert all(torch.equal(narrow[name], tensor.bfloat16()) for name, tensor in wide.items())
    assert loaded(tmp_path / "bf16").dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["gpt2", "mistral"])
def test_merging_in_half_precision_rounds_the_sum_alone(form: str, tmp_path: Path) -> None:
    stored = random_stored(form, adapters=True, dtype=torch.bfloat16)
    exported(stored, tmp_path / "hf", merge_adapters=True)
    tensors = tensors_of(tmp_path / "hf")
    for name, linear in stored.linears.items():
        exact = stored.dense(name).double()
        if linear.adapter_rank:
            down, up = (stored.read(f"{name}.adapter.{factor}").double() for factor in ("down", "up"))
            exact += up @ down / linear.adapter_rank
        found = weight_in(tensors, stored.model.family, name).double()
        # Half a step of bf16, and fp32's own error.
        assert ((found - exact).abs() <= exact.abs() * 2**-8 * (1 + 1e-3) + 1e-6).all()


def test_a_number_beyond_the_range_is_refused(tmp_path: Path) -> None:
    stored = random_stored("llama")
    stored.module.layers[1].up.weight.values.data[3, 5] = 70_000.0
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: 7e\+04 is beyond the range of .*16"):
        exported(stored, tmp_path / "hf", dtype=torch.float16)


@pytest.mark.parametrize("form", FORMS)
def test_the_size_is_known_before(form: str, tmp_path: Path) -> None:
    stored = random_stored(form, adapters=True)
    options = Options(tokenizer=False)
    for number, each in enumerate((options, replace(options, pad_adapters=True), replace(options, dtype=torch.half))):
        folder = tmp_path / str(number)
        exported(stored, folder, **vars(each))
        assert HuggingFaceExport(stored, each).bytes == pytest.approx(size_of(folder), rel=0.01)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_proven(form: str, tmp_path: Path) -> None:
    stored = random_stored(form, adapters=True, dtype=torch.bfloat16, rank=3)
    if stored.model.family in ("llama", "mistral") and stored.model.rotary_scaling is None:
        # Of no effect without a scaling, and said nowhere then.
        stored.model = ModelConfig.model_validate({**stored.model.model_dump(), "rotary_original_length": 40})
    changes: list[dict[str, Any]] = [{}, {"pad_adapters": True}, {"merge_adapters": True}, {"dtype": torch.half}]
    for number, change in enumerate(changes):
        options = Options(tokenizer=False, **change)
        convert(stored, "hf", tmp_path / str(number), options, Transfer(), Transfer())


@pytest.mark.parametrize("form", ["gpt2", "llama"])
@pytest.mark.parametrize("merged", [False, True])
def test_files_do_not_depend_on_the_size_of_blocks_or_the_place(
    form: str, merged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = random_stored(form, adapters=True)
    exported(stored, tmp_path / "a", merge_adapters=merged)
    monkeypatch.setattr(stored_module, "CHUNK_BYTES", 4096)
    read, sizes = stored.read, []

    def watched(name: str, start: int = 0, stop: int | None = None) -> Tensor:
        found = read(name, start, stop)
        sizes.append(found.nbytes)
        return found

    monkeypatch.setattr(stored, "read", watched)
    (tmp_path / "elsewhere").mkdir()
    exported(stored, tmp_path / "elsewhere" / "b", merge_adapters=merged)
    # What is merged comes whole.
    assert (max(sizes) <= 4096) != merged
    for path in sorted((tmp_path / "a").rglob("*")):
        if path.is_file():
            other = tmp_path / "elsewhere" / "b" / path.relative_to(tmp_path / "a")
            assert path.read_bytes() == other.read_bytes(), path


def test_the_config_says_the_sizes_to_old_and_new_versions(tmp_path: Path) -> None:
    exported(random_stored("llama scaled"), tmp_path / "llama")
    content = json.loads((tmp_path / "llama" / "config.json").read_text())
    rotary = content["rope_parameters"]
    assert rotary == {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    assert {"rope_theta": content["rope_theta"], **content["rope_scaling"]} == rotary
    read = transformers.AutoConfig.from_pretrained(tmp_path / "llama")
    assert {name: read.rope_parameters[name] for name in rotary} == rotary
    assert (content["architectures"], content["dtype"]) == (["LlamaForCausalLM"], "float32")
    exported(random_stored("mistral"), tmp_path / "mistral")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "mistral").sliding_window is None


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer(
        train_tokenizer([f"the weight {n} of {n * 7919 % 1000}" for n in range(500)], 300)
    )
    export = HuggingFaceExport(random_stored("llama", vocab_size=300, tokenizer=tokenizer), Options())
    (tmp_path / "hf").mkdir()
    assert export.write(tmp_path / "hf", Transfer()) == []
    assert export.bytes == pytest.approx(size_of(tmp_path / "hf"), rel=0.01)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "the weight 12 of  77\n"
    assert read.encode(text) == tokenizer.encode(text).tolist()
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    for content in (config, generation):
        assert content.eos_token_id == content.bos_token_id == tokenizer.end_of_document
    loaded(tmp_path / "hf").generate(torch.tensor([read.encode(text)]), max_new_tokens=3, do_sample=False)


def test_without_a_tokenizer_no_end_is_known(tmp_path: Path) -> None:
    lines = exported(random_stored("opt"), tmp_path / "hf")
    assert [line for line in lines if "eos_token_id" in line] == lines
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hf").eos_token_id is None
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id is None
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_what_cannot_be_is_refused_before_anything_is_written() -> None:
    def refused(stored: StoredModel, options: Options, expected: str) -> None:
        with pytest.raises(UserError, match=expected) as caught:
            HuggingFaceExport(stored, options)
        assert "\n" not in str(caught.value)

    without = Options(tokenizer=False)
    refused(random_stored("opt"), Options(), "the tokenizer of memory is not there")
    odd = random_stored("opt")
    odd.model = ModelConfig.model_validate({**odd.model.model_dump(), "norm_epsilon": 1e-6})
    refused(odd, without, r"model\.norm_epsilon 1e-06 cannot be had in Hugging Face's OPT, which has 1e-05")
    wide = random_stored("llama", adapters=True, rank=520)
    refused(wide, replace(without, pad_adapters=True), "rank 520 cannot be padded: vLLM accepts 512 at most")


def test_options_about_adapters_that_are_not_there_are_told(tmp_path: Path) -> None:
    for option in ("merge_adapters", "pad_adapters"):
        lines = exported(random_stored("llama"), tmp_path / option, **{option: True})
        assert any("has no adapters" in line for line in lines)
        assert not (tmp_path / option / "adapter").exists()
