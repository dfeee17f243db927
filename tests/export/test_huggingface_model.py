"""A folder of Hugging Face's form, ours, transformers' own or a published one's, is read bit for bit, rows at a time,
as the model that it is; what our model would compute otherwise, and what does not fit together, is refused in one line.

Run: pytest tests/export/test_huggingface_model.py
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slope_dist.data.sentencepiece_model import SentencePieceTokenizer, train_tokenizer
from slope_dist.errors import UserError
from slope_dist.export.huggingface_model import HuggingFaceModel
from slope_dist.export.opening import open_model
from slope_dist.models import shape_of
from tests.export.hugging_face import EXACT, difference, exported, ours, relative, theirs, with_adapter
from tests.export.models import random_stored
from tests.models.twins import FORMS, random_model, twin_of

WEIGHTS = "model.safetensors"
ADAPTER = "adapter/adapter_model.safetensors"


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


@pytest.mark.parametrize("form", ["opt", "gpt2", "llama"])
@pytest.mark.parametrize("root", [False, True])
def test_what_peft_saves_is_read(form: str, root: bool, tmp_path: Path) -> None:
    twin = twin_of(random_model(FORMS[form]), FORMS[form])
    twin.save_pretrained(tmp_path / "hf")
    gpt2 = FORMS[form].family == "gpt2"
    names = ["c_attn", "mlp.c_fc"] if gpt2 else ["q_proj", "v_proj"]
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=names,
        rank_pattern={names[1]: 5},
        alpha_pattern={} if root else {names[0]: 2},
        use_rslora=root,
        fan_in_fan_out=gpt2,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    made = peft.get_peft_model(twin, config).eval()
    made.save_pretrained(tmp_path / "hf" / "adapter")
    found = HuggingFaceModel(tmp_path / "hf")
    assert {form.adapter_rank for form in found.linears.values()} == {0, 3, 5}
    # A scaling of theirs that is none of ours is multiplied into a factor, which rounds it.
    assert difference(ours(found), theirs(made)) < 2 * EXACT


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each family, with adapters."""
    made = {}
    for form in ("opt", "opt 350M", "gpt2", "llama", "llama scaled", "mistral"):
        made[form] = tmp_path_factory.mktemp("written") / "hf"
        exported(random_stored(form, adapters=True), made[form])
    return made


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A folder of one's own of a form, to damage."""

    def copied(form: str) -> Path:
        return Path(shutil.copytree(folders[form], tmp_path / "copy"))

    return copied


def refused(folder: Path, expected: str, act: Callable[[HuggingFaceModel], object] = lambda model: None) -> None:
    """Opening, or `act`, ends in one line that has this in it."""
    with pytest.raises(UserError) as caught:
        act(HuggingFaceModel(folder))
    assert expected in str(caught.value), str(caught.value)
    assert str(caught.value).isprintable()
    assert str(folder) in str(caught.value)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object], metadata: dict[str, str] | None = None) -> None:
    """Change a file of tensors; its header keeps nothing but `metadata`."""
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, metadata)


GONE = object()
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


def spoilt(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name])

    return spoil


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


def test_an_adapter_of_another_base_is_refused(copy, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy("llama")
    rewrite(folder / WEIGHTS, spoilt(GATE, lambda tensor: tensor + 1))
    refused(folder, f"{ADAPTER} is an adapter of another base: expected weights with identity")
    shutil.rmtree(folder / "adapter")
    shutil.copytree(folders["llama scaled"] / "adapter", folder / "adapter")
    refused(folder, "is an adapter of another base")
    # One that says nothing of its base is known by its shapes alone.
    for form, expected in (
        ("llama scaled", "expected factors [r, 64] and [32, r]"),
        ("opt", "has no such linear layer"),
    ):
        shutil.rmtree(folder / "adapter")
        shutil.copytree(folders[form] / "adapter", folder / "adapter")
        rewrite(folder / ADAPTER, lambda tensors: None)
        refused(folder, expected)


UP = "base_model.model.model.layers.1.mlp.gate_proj.lora_B.weight"
DOWN = UP.replace("_B", "_A")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda factors: factors.pop(UP), "gate_proj.lora_A.weight: expected two factors [r, 64] and [160, r]"),
        (
            lambda factors: [factors.pop(name) for name in (UP, DOWN)],
            "gate_proj has no adapter, and is a target module",
        ),
        (lambda factors: factors.clear() or factors.update(x=torch.ones(1)), "x: the base has no such linear layer"),
        (lambda factors: factors.update({UP.replace("layers.1", "layers.3"): factors[UP].clone()}), "no such linear"),
        (spoilt(UP, lambda factor: factor[:, :3].clone()), "expected factors [r, 64] and [160, r] for this base"),
        (spoilt(UP, lambda factor: factor[0].clone()), "expected two factors"),
        (spoilt(UP, torch.Tensor.byte), "expected floating point, found U8 [160, 4]"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(copy, change, expected: str) -> None:
    folder = copy("llama")
    rewrite(folder / ADAPTER, change)
    refused(folder, expected)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("peft_type", "LOHA", 'peft_type is "LOHA"; our model has "LORA"'),
        ("bias", "all", 'bias is "all"; our model has "none"'),
        ("use_dora", True, "use_dora is true; our model has false"),
        ("modules_to_save", ["lm_head"], "modules_to_save is"),
        ("layers_to_transform", [1], "layers_to_transform is [1]; our model has null"),
        ("r", 5, "down_proj: adapter_config.json says rank 5, found rank 4"),
        ("r", 0, "r is 0; expected a number above 0"),
        ("lora_alpha", "1", "lora_alpha is"),
        ("rank_pattern", {"gate_proj": 5}, "gate_proj: adapter_config.json says rank 5, found rank 4"),
        ("rank_pattern", 5, "rank_pattern is 5; expected an object"),
        ("target_modules", [], "target_modules is []; expected a list of names"),
        ("target_modules", ["q_proj", "rubbish"], "the base has no linear layer rubbish"),
        ("target_modules", ["q_proj", "v_proj"], "is not among the target_modules"),
    ],
)
def test_an_adapter_that_does_something_else_is_refused(copy, key: str, value: Any, expected: str) -> None:
    folder = copy("llama")
    edit(folder / "adapter" / "adapter_config.json", lambda config: config.update({key: value}))
    refused(folder, expected)


def test_a_header_that_does_not_fit_its_adapter_is_refused(copy) -> None:
    folder = copy("gpt2")
    layer = "transformer.h.1.attn.q_proj"
    for ranks, expected in (
        ("rubbish", "ranks: expected ranks of linear layers of the base"),
        (json.dumps({"other": 4}), "ranks: expected ranks of linear layers of the base"),
        (json.dumps({layer: -4}), "ranks: expected ranks of linear layers of the base"),
        (json.dumps({layer: 20}), "c_attn: the header's ranks do not fit rank 12"),
        (json.dumps({layer: 4}), "c_proj has an adapter that they do not name"),
    ):
        rewrite(folder / ADAPTER, lambda factors: None, {"ranks": ranks})
        refused(folder, expected)
    own = {name: form.adapter_rank for name, form in random_stored("gpt2", adapters=True).linears.items()}
    own = {name: rank for name, rank in own.items() if rank}
    rewrite(folder / ADAPTER, lambda factors: None, {"ranks": json.dumps(own | {"transformer.h.0.attn.q_proj": 4})})
    refused(folder, "ranks name layers that have no adapter")
    other = layer.replace("q_proj", "k_proj")
    rewrite(folder / ADAPTER, lambda factors: None, {"ranks": json.dumps(own | {layer: 3, other: 5})})
    refused(folder, f"expected zeros beside the adapter of {layer}", lambda model: model.read(f"{layer}.adapter.up"))


def test_an_adapter_of_ours_that_others_saved_again_is_read(copy) -> None:
    folder = copy("gpt2")
    expected = theirs(with_adapter(folder))
    # Nothing of ours is left in its header: query, key and value share the whole adapter of their module.
    rewrite(folder / ADAPTER, lambda factors: None)
    found = HuggingFaceModel(folder)
    assert found.linears["transformer.h.1.attn.q_proj"].adapter_rank == 12
    assert found.linears["transformer.h.0.attn.q_proj"].adapter_rank == 0
    assert relative(ours(found), expected) < 1e-5
    exported(found, folder.parent / "again")
    assert difference(theirs(with_adapter(folder.parent / "again")), expected) < EXACT


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
