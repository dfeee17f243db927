"""A folder of Hugging Face's form, ours, transformers' own or a published one's, is read bit for bit, rows at a time,
as the model that it is; what our model would compute otherwise, and what does not fit together, is refused in one line.

Run: pytest tests/export/test_huggingface_model.py
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slope_dist.data.sentencepiece_model import SentencePieceTokenizer, train_tokenizer
from slope_dist.errors import UserError
from slope_dist.export.huggingface_model import HuggingFaceModel
from slope_dist.export.opening import open_model
from slope_dist.planning.shapes import shape_of
from tests.export.damage import WEIGHTS, edit, refused, rewrite, spoilt
from tests.export.hugging_face import EXACT, difference, exported, ours, theirs
from tests.export.models import random_stored
from tests.models.twins import FORMS, random_model, twin_of


def dense_in(stored: Any, name: str) -> Tensor:
    """A tensor that `StoredModel.read` knows of a model whose linears are all dense."""
    return stored.dense(name.removesuffix(".weight.values")) if name.endswith(".weight.values") else stored.read(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_what_was_written_is_read_bit_for_bit(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    stored = random_stored(form, adapters=True, dtype=dtype)
    exported(stored, tmp_path / "hf", shard_bytes=100_000)
    exported(stored, tmp_path / "padded", pad_adapters=True)
    for folder in (tmp_path / "hf", tmp_path / "padded"):
        found = open_model(folder)
        assert isinstance(found, HuggingFaceModel)
        assert found.dtype == dtype
        assert shape_of(found.model) == shape_of(stored.model)
        assert found.model.family == stored.model.family
        assert found.shapes.keys() == {name for name in stored.shapes if not name.endswith(".indices")}
        for name, shape in found.shapes.items():
            whole = found.read(name)
            assert whole.dtype == dtype
            assert whole.shape == shape
            assert torch.equal(whole, dense_in(stored, name)), name
            assert torch.equal(found.read(name, 3, 5), whole[3:5])
            assert torch.equal(found.read(name, 2), whole[2:])
    assert difference(ours(found), ours(stored)) == 0


@pytest.mark.parametrize("form", FORMS)
def test_what_transformers_saves_is_read(form: str, tmp_path: Path) -> None:
    twin = twin_of(random_model(FORMS[form]), FORMS[form])
    twin.save_pretrained(tmp_path / "hf")
    found = HuggingFaceModel(tmp_path / "hf")
    assert not found.has_adapters
    assert difference(ours(found), theirs(twin)) < EXACT


GONE = "(gone)"
CONFIGS: list[tuple[str, str, Any, str]] = [
    ("opt", "model_type", "bloom", 'model_type is "bloom"; our model has one of "opt", "gpt2", "llama", "mistral"'),
    ("opt", "model_type", GONE, "model_type is missing"),
    ("opt", "model_type", ["opt"] * 99, "model_type is ["),
    ("opt", "activation_function", "gelu", 'activation_function is "gelu"; our model has "relu"'),
    ("opt", "enable_bias", False, "enable_bias is false; our model has true"),
    ("opt", "layer_norm_elementwise_affine", False, "our model has true"),
    ("opt", "tie_word_embeddings", False, "tie_word_embeddings is false; our model has true"),
    ("opt", "_remove_final_layer_norm", True, "_remove_final_layer_norm is true; our model has false"),
    ("opt", "hidden_size", "64", 'hidden_size is "64"; expected a whole number above 0'),
    ("opt", "hidden_size", True, "hidden_size is true; expected a whole number above 0"),
    ("opt", "hidden_size", 10**30, "expected a whole number above 0"),
    ("opt", "hidden_size", GONE, "hidden_size is missing; expected a whole number above 0"),
    ("opt", "hidden_size", 60, "model.hidden_size 60 is not a multiple of 8"),
    ("opt", "num_hidden_layers", 10**6, "num_layers: Input should be less than or equal to 10000"),
    ("opt", "num_hidden_layers", 9999, "expected tensors of 9999 blocks, as config.json says, found 52 tensors"),
    ("opt", "vocab_size", 96, "decoder.embed_tokens.weight: expected F32 [96, 64], found F32 [97, 64]"),
    ("opt", "do_layer_norm_before", False, "model.decoder.final_layer_norm.bias: expected only the tensors"),
    ("opt", "pruned_heads", {"0": [1]}, "pruned_heads is"),
    ("gpt2", "activation_function", "gelu", 'our model has one of "gelu_new", "gelu_pytorch_tanh"'),
    ("gpt2", "scale_attn_weights", False, "our model has true"),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx is true; our model has false"),
    ("gpt2", "add_cross_attention", True, "our model has false"),
    ("gpt2", "layer_norm_epsilon", float("nan"), "layer_norm_epsilon is NaN; expected a number above 0"),
    ("gpt2", "layer_norm_epsilon", "1e-5", "expected a number above 0"),
    ("llama", "hidden_act", "gelu", 'hidden_act is "gelu"; our model has "silu"'),
    ("llama", "attention_bias", True, "attention_bias is true; our model has false"),
    ("llama", "mlp_bias", True, "mlp_bias is true; our model has false"),
    ("llama", "head_dim", 32, "head_dim is 32; our model has hidden_size / num_attention_heads, which is 16"),
    ("llama", "num_key_value_heads", 3, "model.num_heads 4 is not a multiple of model.num_kv_heads 3"),
    ("llama", "partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5; our model has 1"),
    ("llama", "rope_parameters", {"rope_type": "yarn"}, 'rope_parameters.rope_type is "yarn"; our model has one of'),
    ("llama", "rope_parameters", [1], "rope_parameters is [1]; expected an object"),
    ("llama", "rope_parameters", {"rope_type": "llama3"}, "rope_parameters.factor is missing"),
    ("llama", "rope_scaling", {"type": "linear", "factor": 2.0}, 'rope_scaling.type is "linear"'),
    ("llama", "tie_word_embeddings", True, "lm_head.weight: expected the numbers of model.embed_tokens.weight"),
    ("mistral", "sliding_window", 64, "sliding_window is 64; our model has null"),
    ("mistral", "max_position_embeddings", 2**20, "found"),
]


@pytest.mark.parametrize(("form", "key", "value", "expected"), CONFIGS, ids=lambda value: str(value)[:30])
def test_a_model_that_ours_is_not_is_refused(copy, form: str, key: str, value: Any, expected: str) -> None:
    folder = copy(form)

    def change(content: dict[str, Any]) -> None:
        content.pop(key, None)
        if value is not GONE:
            content[key] = value

    edit(folder / "config.json", change)
    if key == "max_position_embeddings":
        # Without positions to learn nothing else tells; the window of a config without one does.
        edit(folder / "config.json", lambda content: content.pop("sliding_window"))
        expected = "sliding_window is missing; our model has null"
    refused(folder, expected)


def test_values_of_any_depth_are_refused_in_one_line(copy) -> None:
    folder = copy("llama")
    content = (folder / "config.json").read_text()
    for depth in (10, *range(900, 1010)):
        # Those that can just be read, wherever the interpreter's limit is, cannot be shown.
        (folder / "config.json").write_text(content.replace('"silu"', "[" * depth + "]" * depth))
        refused(folder, "config.json")


def test_what_only_training_reads_and_what_has_no_effect_is_taken(copy) -> None:
    folder = copy("mistral")
    edit(folder / "config.json", lambda content: content.update(attention_dropout=0.3, sliding_window=80, new_key=[1]))
    assert shape_of(HuggingFaceModel(folder).model) == shape_of(random_stored("mistral").model)


@pytest.mark.parametrize("form", ["llama", "llama scaled"])
def test_configs_of_older_versions_say_the_same(copy, form: str) -> None:
    folder = copy(form)
    before = HuggingFaceModel(folder).model
    edit(folder / "config.json", lambda content: content.pop("rope_parameters"))
    assert HuggingFaceModel(folder).model == before
    assert before.rotary_base in (100.0, 500_000.0)

    def type_alone(content: dict[str, Any]) -> None:
        if content["rope_scaling"] is not None:
            content["rope_scaling"]["type"] = content["rope_scaling"].pop("rope_type")

    edit(folder / "config.json", type_alone)
    assert HuggingFaceModel(folder).model == before


@pytest.mark.parametrize(("form", "prefix"), [("opt", "model."), ("opt 350M", "model."), ("gpt2", "transformer.")])
def test_names_and_buffers_of_older_versions_are_known(copy, form: str, prefix: str) -> None:
    folder = copy(form)
    shutil.rmtree(folder / "adapter")
    expected = ours(HuggingFaceModel(folder))

    def older(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix(prefix)] = tensors.pop(name)
        if form == "gpt2":
            tensors["h.0.attn.bias"] = torch.ones(1, 1, 80, 80, dtype=torch.bool)
            tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)
        table = next(tensors[name] for name in ("decoder.embed_tokens.weight", "wte.weight") if name in tensors)
        tensors["lm_head.weight"] = table.clone()

    rewrite(folder / WEIGHTS, older)
    assert difference(ours(HuggingFaceModel(folder)), expected) == 0


GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensors: tensors.pop(GATE), f"{GATE}: expected F32 [160, 64], found no such tensor"),
        (lambda tensors: tensors.pop("lm_head.weight"), "lm_head.weight: expected F32 [97, 64], found no such tensor"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "extra: expected only the tensors of its model"),
        (lambda tensors: tensors.update({"a\n\x1b": torch.ones(1)}), "a\\n\\x1b: expected only the tensors"),
        (spoilt(GATE, lambda tensor: tensor[:-1].clone()), f"{GATE}: expected F32 [160, 64], found F32 [159, 64]"),
        (spoilt(GATE, torch.Tensor.half), f"{GATE}: expected F32 [160, 64], found F16 [160, 64]"),
        (spoilt("model.embed_tokens.weight", torch.Tensor.double), "expected F32, BF16 or F16, found F64"),
    ],
)
def test_other_tensors_than_the_models_are_refused(copy, change, expected: str) -> None:
    folder = copy("llama")
    rewrite(folder / WEIGHTS, change)
    refused(folder, expected)


@pytest.mark.parametrize("form", ["gpt2", "llama"])
@pytest.mark.parametrize("number", [torch.nan, -torch.inf])
def test_numbers_that_are_none_are_refused_where_they_are_read(copy, form: str, number: float) -> None:
    folder = copy(form)
    shutil.rmtree(folder / "adapter")
    name = "transformer.h.1.mlp.c_fc.weight" if form == "gpt2" else GATE

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name][9, 9] = number

    rewrite(folder / WEIGHTS, spoil)
    ours_name = f"{name.removesuffix('.weight')}.weight.values"
    assert HuggingFaceModel(folder).read(ours_name, 0, 9).isfinite().all()
    refused(folder, f"{name}: expected finite numbers", lambda model: model.read(ours_name, 9, 10))


def test_files_that_are_not_there_or_are_others_are_refused(copy) -> None:
    folder = copy("llama")
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    refused(folder, "holds no weights: expected model.safetensors or model.safetensors.index.json; weights in other")
    (folder / WEIGHTS).write_bytes(weights[:-1])
    refused(folder, "model.safetensors: expected safetensors, found")
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    refused(folder, "model.safetensors: expected a plain file")
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / "nowhere")
    refused(folder, "model.safetensors: cannot be read: No such file")
    (folder / WEIGHTS).unlink()
    (folder / "blob").write_bytes(weights)
    # As in the folders that huggingface_hub keeps.
    (folder / WEIGHTS).symlink_to("blob")
    HuggingFaceModel(folder)
    (folder / "config.json").write_text("{}")
    refused(folder, "model_type is missing")
    (folder / "config.json").write_text("[" * 10_000)
    refused(folder, "config.json is not JSON")


def test_a_file_that_changes_while_it_is_read_is_refused(copy) -> None:
    folder = copy("llama")
    model = HuggingFaceModel(folder)
    model.read("model.norm.weight")
    os.truncate(folder / WEIGHTS, 1000)
    with pytest.raises(UserError, match="found it changed"):
        model.read("model.norm.weight")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda index: index.pop("weight_map"), "weight_map: expected an object of file names"),
        (lambda index: index.update(weight_map={"a": 1}), "weight_map: expected an object of file names"),
        (lambda index: index["weight_map"].pop(GATE), f"{GATE}: expected in None, found in model-0000"),
        (
            lambda index: index["weight_map"].update(other="model-00001-of-00004.safetensors"),
            "other: expected in model",
        ),
        (lambda index: index["weight_map"].update({GATE: "model-00001-of-00004.safetensors"}), f"{GATE}: expected in"),
        (lambda index: index["weight_map"].update({GATE: "../x.safetensors"}), "is not the name of a file of tensors"),
        (lambda index: index["weight_map"].update({GATE: "/etc/passwd"}), "is not the name of a file of tensors"),
        (lambda index: index["weight_map"].update({GATE: "gone.safetensors"}), "gone.safetensors: cannot be read"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, change, expected: str) -> None:
    exported(random_stored("llama"), tmp_path / "hf", shard_bytes=150_000)
    assert len(list((tmp_path / "hf").glob("model-*-of-00004.safetensors"))) == 4
    edit(tmp_path / "hf" / "model.safetensors.index.json", change)
    refused(tmp_path / "hf", expected)


def test_the_tokenizer_is_that_of_the_folder_or_the_one_named(tmp_path: Path) -> None:
    lines = [f"the weight {number} of {number * 7919 % 1000}" for number in range(500)]
    tokenizer = SentencePieceTokenizer(train_tokenizer(lines, 300))
    exported(random_stored("llama", vocab_size=300, tokenizer=tokenizer), tmp_path / "hf", tokenizer=True)
    assert HuggingFaceModel(tmp_path / "hf").tokenizer().sha256 == tokenizer.sha256
    for path in (tmp_path / "hf").glob("tokenizer*"):
        path.unlink()
    refused(tmp_path / "hf", "or name the tokenizer with --tokenizer PATH", HuggingFaceModel.tokenizer)
    (tmp_path / "given.model").write_bytes(tokenizer.model)
    assert HuggingFaceModel(tmp_path / "hf", tmp_path / "given.model").tokenizer().sha256 == tokenizer.sha256
    edit(tmp_path / "hf" / "config.json", lambda content: content.update(eos_token_id=[7, 8]))
    with pytest.raises(UserError, match=r"ends a document with id 1, and the eos_token_id of config\.json is \[7, 8\]"):
        HuggingFaceModel(tmp_path / "hf", tmp_path / "given.model").tokenizer()
    exported(random_stored("llama"), tmp_path / "small")
    with pytest.raises(UserError, match="it has 300 ids, and the model 97"):
        HuggingFaceModel(tmp_path / "small", tmp_path / "given.model").tokenizer()
