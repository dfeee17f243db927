"""Claim: the compressed form gives back every 2:4 weight bit for bit, and all else as the form "hf" does; ten lines
that know nothing of ours read it, and compressed-tensors understands what its config.json says; and what is damaged in
a way that can be seen is refused in one line that names the file.

Run: pytest tests/export/test_compressed.py
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.config import Sparse24BitMaskConfig, SparsityCompressionConfig
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from slope_dist.errors import UserError
from slope_dist.export import open_model
from slope_dist.export.compressed import CompressedExport, CompressedModel
from slope_dist.export.options import Options
from slope_dist.export.stored import StoredModel
from slope_dist.inference import InferenceModel
from slope_dist.sparse import codec
from slope_dist.transfer import Transfer
from tests.export.damage import refusal
from tests.export.hugging_face import exported
from tests.export.models import MemoryModel, random_stored
from tests.export.small_tokenizers import VOCAB_SIZE, small_tokenizer
from tests.models.twins import FORMS, VOCAB
from tests.runs import same_bits

DTYPES = (torch.float32, torch.bfloat16)
WEIGHTS, CONFIG = "model.safetensors", "config.json"
NAMES = {
    "opt": ("decoder.layers.1.fc1", "model.decoder.layers.1.fc1"),
    "gpt2": ("transformer.h.1.attn.k_proj", "transformer.h.1.attn.k_proj"),
    "llama": ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"),
    "mistral": ("model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.v_proj"),
}
"""A 2:4 layer of each family: our name, and the one in the files."""


def written(stored: StoredModel, folder: Path, shard_bytes: int = 10**9, **options: Any) -> list[str]:
    """Write a model to `folder`, and return what the writer had to say."""
    folder.mkdir()
    export = CompressedExport(stored, Options(**({"tokenizer": False} | options)), shard_bytes=shard_bytes)
    said = export.write(folder, Transfer())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size == pytest.approx(export.bytes, rel=0.1)
    return said


def assert_same(found: StoredModel, expected: StoredModel) -> None:
    """Every tensor, bit for bit, and how each linear layer is stored."""
    assert isinstance(found, CompressedModel)
    assert found.dtype == expected.dtype
    assert found.linears == expected.linears
    assert found.shapes == expected.shapes
    for name in expected.shapes:
        assert same_bits(found.read(name), expected.read(name)), name


def logits_of(stored: StoredModel) -> Tensor:
    return InferenceModel(stored).logits(torch.arange(2 * 31).view(2, 31) * 7 % VOCAB)


def decoded(file: dict[str, Tensor], module: str) -> np.ndarray:
    """A weight [O, I] as anyone would read it out of the layout."""
    rows, columns = file[f"{module}.shape"].numpy().reshape(-1)
    kept = file[f"{module}.compressed"].float().numpy()
    bits = np.unpackbits(file[f"{module}.bitmask"].numpy(), axis=1, count=columns, bitorder="little")
    dense = np.zeros((rows, columns), dtype=np.float32)
    dense[bits.astype(bool)] = kept.reshape(-1)
    return dense


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapters", [False, True], ids=["plain", "adapters"])
@pytest.mark.parametrize("form", FORMS)
def test_a_model_comes_back(form: str, adapters: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    stored = random_stored(form, adapters=adapters, dtype=dtype, rank=3)
    written(stored, tmp_path / "out")
    opened = open_model(tmp_path / "out")
    assert_same(opened, stored)
    assert torch.equal(logits_of(opened), logits_of(stored))
    file = load_file(tmp_path / "out" / WEIGHTS)
    ours, theirs = NAMES[stored.model.family]
    assert np.array_equal(decoded(file, theirs), stored.dense(ours).float().numpy())
    assert file[f"{theirs}.compressed"].dtype == dtype
    assert file[f"{theirs}.shape"].tolist() == list(stored.linears[ours].shape)
    assert file[f"{theirs}.shape"].dtype == torch.int64
    mask = codec.mask_of(stored.read(f"{ours}.weight.indices"), stored.matrix(ours).pattern).numpy()
    assert np.array_equal(file[f"{theirs}.bitmask"].numpy(), np.packbits(mask, axis=1, bitorder="little"))
    values = stored.read(f"{ours}.weight.values", 3, 11)
    assert same_bits(opened.read(f"{ours}.weight.values", 3, 11), values)
    indices = stored.read(f"{ours}.weight.indices", 3, 11)
    assert same_bits(opened.read(f"{ours}.weight.indices", 3, 11), indices)


@pytest.mark.parametrize("form", ["opt 350M", "gpt2", "llama", "llama tied"])
def test_all_else_is_that_of_hugging_face(form: str, tmp_path: Path) -> None:
    stored = random_stored(form, adapters=True)
    written(stored, tmp_path / "out")
    exported(stored, tmp_path / "hf")
    file, dense = (load_file(tmp_path / name / WEIGHTS) for name in ("out", "hf"))
    modules = {name.removesuffix(".bitmask") for name in file if name.endswith(".bitmask")}
    rest = {name for name in file if name.rpartition(".")[0] not in modules or name.endswith(".bias")}
    for name in rest:
        assert same_bits(file[name], dense[name]), name
    # A GPT-2's query, key and value are one matrix there.
    fused = {re.sub(r"\.attn\.[qkv]_proj$", ".attn.c_attn", module) for module in modules}
    assert rest | {f"{module}.weight" for module in fused} == dense.keys()
    for module in modules & fused:
        expected = dense[f"{module}.weight"].numpy()
        assert np.array_equal(decoded(file, module), expected.T if stored.model.family == "gpt2" else expected)
    if stored.model.family == "gpt2":
        parts = [decoded(file, f"transformer.h.1.attn.{kind}_proj") for kind in "qkv"]
        assert np.array_equal(np.concatenate(parts).T, dense["transformer.h.1.attn.c_attn.weight"].numpy())

    content, usual = (json.loads((tmp_path / folder / CONFIG).read_bytes()) for folder in ("out", "hf"))
    del content["quantization_config"]
    assert content == usual
    paths = [tmp_path / folder / "adapter" / "adapter_model.safetensors" for folder in ("out", "hf")]
    found, expected = (load_file(path) for path in paths)
    if stored.model.family == "gpt2":
        # Each of the three has one of its own, where theirs have one of three times the rank, mostly zeros.
        key = "base_model.model.transformer.h.1.attn.{}.lora_{}.weight"
        assert found[key.format("q_proj", "B")].shape == (64, 4)
        assert expected[key.format("c_attn", "B")].shape == (192, 12)
        firsts = [found.pop(key.format(f"{kind}_proj", "A")) for kind in "qkv"]
        assert same_bits(torch.cat(firsts), expected[key.format("c_attn", "A")])
        found, expected = ({key: file[key] for key in file if "attn.c_attn" not in key} for file in (found, expected))
        found = {key: tensor for key, tensor in found.items() if not re.search(r"attn\.[qkv]_proj", key)}
    else:
        configs = [path.with_name("adapter_config.json").read_bytes() for path in paths]
        assert configs[0] == configs[1]
    assert found.keys() == expected.keys()
    assert all(same_bits(found[key], expected[key]) for key in expected)


def test_layers_of_one_module_may_be_stored_otherwise(tmp_path: Path) -> None:
    stored = random_stored("gpt2")
    dense = "transformer.h.2.attn.k_proj"
    expected = stored.dense(dense)
    stored.linears[dense] = replace(stored.linears[dense], pattern=None)
    stored._tensors[f"{dense}.weight.values"] = expected
    written(stored, tmp_path / "out")
    assert_same(open_model(tmp_path / "out"), stored)
    file = load_file(tmp_path / "out" / WEIGHTS)
    assert same_bits(file[f"{dense}.weight"], expected)
    assert "transformer.h.2.attn.c_attn.weight" not in file
    sparsity = json.loads((tmp_path / "out" / CONFIG).read_bytes())["quantization_config"]["sparsity_config"]
    # Those of the first block are all dense.
    assert sparsity["ignore"] == ["transformer.h.0.attn.c_attn", dense, "lm_head"]
    assert "transformer.h.0.attn.c_attn.weight" in file


@pytest.mark.parametrize("pattern", ["1:2", "2:8", "4:8"])
def test_other_patterns_are_stored_dense_and_said(pattern: str, tmp_path: Path) -> None:
    stored = random_stored("mistral", pattern=pattern, adapters=True)
    said = written(stored, tmp_path / "out")
    assert any(f"18 linear layers of pattern {pattern} are stored dense" in line for line in said)
    opened = open_model(tmp_path / "out")
    for name, form in stored.linears.items():
        assert opened.linears[name] == replace(form, pattern=None)
        assert same_bits(opened.dense(name), stored.dense(name))
    assert torch.equal(logits_of(opened), logits_of(stored))


def test_what_config_json_says_is_true_and_understood(tmp_path: Path) -> None:
    stored = random_stored("opt")
    said = written(stored, tmp_path / "out")
    assert not any("are stored dense" in line for line in said)
    assert any("convert to hf" in line for line in said)
    content = json.loads((tmp_path / "out" / CONFIG).read_bytes())["quantization_config"]
    assert QuantizationConfig.model_validate(content).quant_method == "compressed-tensors"
    sparsity = content["sparsity_config"]
    parsed = SparsityCompressionConfig.load_from_registry(sparsity["format"], **sparsity)
    assert isinstance(parsed, Sparse24BitMaskConfig)
    assert parsed.sparsity_structure == "2:4"

    exported(stored, tmp_path / "hf")
    dense = load_file(tmp_path / "hf" / WEIGHTS)
    modules = {name.removesuffix(".weight") for name in dense if re.search(r"(proj|fc.)\.weight$", name)}
    assert set(parsed.targets or ()) | set(parsed.ignore or ()) == modules | {"lm_head"}
    file = load_file(tmp_path / "out" / WEIGHTS)
    assert set(parsed.targets or ()) == {name.removesuffix(".bitmask") for name in file if name.endswith(".bitmask")}
    zeros = sum(int((tensor == 0).sum()) for tensor in dense.values())
    kept_zeros = sum(int((tensor == 0).sum()) for name, tensor in file.items() if name.endswith(".compressed"))
    assert kept_zeros > 0
    total = sum(tensor.numel() for tensor in dense.values())
    assert parsed.global_sparsity == pytest.approx((zeros - kept_zeros) / total)


def test_numbers_are_cast(tmp_path: Path) -> None:
    stored = random_stored("llama", adapters=True)
    written(stored, tmp_path / "out", dtype=torch.bfloat16)
    opened = open_model(tmp_path / "out")
    for name in stored.shapes:
        expected = stored.read(name)
        assert same_bits(opened.read(name), expected.to(torch.bfloat16) if expected.is_floating_point() else expected)
    stored._tensors["model.layers.1.mlp.up_proj.weight.values"][4, 5] = 1e6
    with pytest.raises(UserError, match=r"1e\+06 is beyond .*float16"):
        written(stored, tmp_path / "half", dtype=torch.float16)


def test_several_files_hold_the_same(tmp_path: Path) -> None:
    stored = random_stored("llama", adapters=True)
    written(stored, tmp_path / "out", shard_bytes=30_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert_same(open_model(tmp_path / "out"), stored)
    index = tmp_path / "out" / "model.safetensors.index.json"
    content = json.loads(index.read_bytes())
    name = next(iter(content["weight_map"]))
    for file in ("../model.safetensors", "/etc/passwd", "model-00099-of-00100.safetensors", 7):
        content["weight_map"][name] = file
        index.write_text(json.dumps(content))
        assert str(tmp_path / "out") in refusal(tmp_path / "out")


def test_the_tokenizer_comes_with_it(tmp_path: Path) -> None:
    tokenizer = small_tokenizer("json")
    stored = random_stored("opt", vocab_size=VOCAB_SIZE, tokenizer=tokenizer)
    written(stored, tmp_path / "out", tokenizer=True)
    assert open_model(tmp_path / "out").tokenizer().sha256 == tokenizer.sha256
    given = tmp_path / "given"
    given.mkdir()
    for name, data in tokenizer.files().items():
        (given / name).write_bytes(data)
    written(stored, tmp_path / "bare")
    with pytest.raises(UserError, match="--tokenizer"):
        open_model(tmp_path / "bare").tokenizer()
    assert open_model(tmp_path / "bare", given).tokenizer().sha256 == tokenizer.sha256
    with pytest.raises(UserError, match="--tokenizer"):
        CompressedExport(random_stored("opt"), Options())


def test_the_documented_reader_reads(tmp_path: Path) -> None:
    document = (Path(__file__).parents[2] / "docs" / "inference-formats.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    reader: dict[str, Any] = {}
    exec(code, reader)
    for form in ("opt", "gpt2"):
        stored = random_stored(form, dtype=torch.bfloat16)
        written(stored, tmp_path / form, shard_bytes=50_000)
        ours, theirs = NAMES[stored.model.family]
        assert np.array_equal(reader["read_compressed"](tmp_path / form, theirs), stored.dense(ours).float().numpy())


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good model with adapters; no test changes it."""
    folder = tmp_path_factory.mktemp("good") / "model"
    written(random_stored("opt", adapters=True), folder)
    return folder


@pytest.fixture
def spoilt(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "spoilt"))


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "adapter/adapter_model.safetensors", "adapter/adapter_config.json"])
def test_a_cut_or_missing_file_is_refused(spoilt: Path, name: str) -> None:
    path = spoilt / name
    data = path.read_bytes()
    for size in (0, 7, len(data) // 2, len(data) - 2):
        path.write_bytes(data[:size])
        assert str(path) in refusal(spoilt)
    path.unlink()
    assert str(path.parent) in refusal(spoilt)


def test_no_flipped_bit_of_a_bitmask_is_read(good: Path, tmp_path: Path) -> None:
    # An adapter has a hash of its weights; without one, only the mask itself tells.
    spoilt = tmp_path / "spoilt"
    shutil.copytree(good, spoilt, ignore=lambda folder, names: ["adapter"])
    data = bytearray((spoilt / WEIGHTS).read_bytes())
    size = int.from_bytes(data[:8], "little")
    name = "model.decoder.layers.1.fc1.bitmask"
    start, stop = json.loads(data[8 : 8 + size])[name]["data_offsets"]
    for position in range(8 + size + start, 8 + size + stop, 97):
        data[position] ^= 1 << position % 8
        (spoilt / WEIGHTS).write_bytes(data)
        data[position] ^= 1 << position % 8
        with pytest.raises(UserError) as caught:
            open_model(spoilt).read("decoder.layers.1.fc1.weight.indices")
        text = str(caught.value)
        assert str(spoilt / WEIGHTS) in text
        assert f"{name}: a group of the mask does not keep exactly 2 of 4" in text


def test_an_adapter_of_other_weights_is_refused(spoilt: Path) -> None:
    path = spoilt / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "adapter of another base" in refusal(spoilt)


MODULE = "model.decoder.layers.1.fc1"
TENSOR_CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "without a mask": (lambda all: all.pop(f"{MODULE}.bitmask"), "expected U8 \\[160, 8\\], found no such tensor"),
    "without a shape": (lambda all: all.pop(f"{MODULE}.shape"), "expected I64 \\[2\\], found no such tensor"),
    "without kept entries": (lambda all: all.pop(f"{MODULE}.compressed"), "expected F32 \\[160, 32\\], found no"),
    "without a bias": (lambda all: all.pop(f"{MODULE}.bias"), "expected F32 \\[160\\], found no such tensor"),
    "with a dense weight too": (
        lambda all: all.update({f"{MODULE}.weight": torch.ones(160, 64)}),
        "expected only the tensors of its model",
    ),
    "with another dtype": (
        lambda all: all.update({f"{MODULE}.compressed": all[f"{MODULE}.compressed"].half()}),
        "expected F32 \\[160, 32\\], found F16 \\[160, 32\\]",
    ),
    "with signed bits": (
        lambda all: all.update({f"{MODULE}.bitmask": all[f"{MODULE}.bitmask"].view(torch.int8)}),
        "found I8",
    ),
    "with half a mask": (
        lambda all: all.update({f"{MODULE}.bitmask": all[f"{MODULE}.bitmask"][:80].clone()}),
        "expected U8 \\[160, 8\\], found U8 \\[80, 8\\]",
    ),
    "with another shape": (
        lambda all: all[f"{MODULE}.shape"].copy_(torch.tensor([64, 160])),
        "expected \\[160, 64\\] of the config's model, found \\[64, 160\\]",
    ),
    "with NaN": (lambda all: all[f"{MODULE}.compressed"][5, 6].fill_(torch.nan), "expected finite numbers"),
}


@pytest.mark.parametrize("what", TENSOR_CHANGES)
def test_wrong_tensors_are_refused(good: Path, tmp_path: Path, what: str) -> None:
    change, message = TENSOR_CHANGES[what]
    spoilt = tmp_path / "spoilt"
    shutil.copytree(good, spoilt, ignore=lambda folder, names: ["adapter"])
    tensors = load_file(spoilt / WEIGHTS)
    change(tensors)
    save_file(tensors, spoilt / WEIGHTS)
    text = refusal(spoilt)
    assert str(spoilt / WEIGHTS) in text
    assert re.search(message, text), text


def test_a_shape_in_a_column_is_read_too(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "column"
    shutil.copytree(good, folder, ignore=lambda folder, names: ["adapter"])
    tensors = load_file(folder / WEIGHTS)
    columns = {name: tensor.view(2, 1) if name.endswith(".shape") else tensor for name, tensor in tensors.items()}
    save_file(columns, folder / WEIGHTS)
    assert same_bits(open_model(folder).dense(NAMES["opt"][0]), open_model(good).dense(NAMES["opt"][0]))


def _quantization(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["quantization_config"].update(changes)


def _sparsity(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["quantization_config"]["sparsity_config"].update(changes)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "of another method": (_quantization(quant_method="gptq"), "quantization_config.quant_method"),
    "that is quantized too": (_quantization(config_groups={"group_0": {}}), "quantization_config.config_groups"),
    "without sparsity": (_quantization(sparsity_config=None), "expected a sparsity_config"),
    "of another layout": (_sparsity(format="sparse-bitmask"), "sparsity_config.format"),
    "whose sparsity is a list": (_quantization(sparsity_config=[]), "expected an object"),
    "that is null": (lambda content: content.update(quantization_config=None), "expected a sparsity_config"),
    "of another width": (lambda content: content.update(ffn_dim=168), "found F32|found U8|found I64"),
    "of another family": (lambda content: content.update(model_type="bert"), "model_type"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_wrong_configs_are_refused(spoilt: Path, what: str) -> None:
    change, message = CONFIGS[what]
    content = json.loads((spoilt / CONFIG).read_bytes())
    change(content)
    (spoilt / CONFIG).write_text(json.dumps(content))
    text = refusal(spoilt)
    assert str(spoilt) in text
    assert re.search(message, text), text


def test_the_twin_of_memory_is_what_it_seems() -> None:
    """The tests above would show nothing of a model without zeros among its kept entries."""
    stored: MemoryModel = random_stored("opt")
    values = stored.read("decoder.layers.1.fc1.weight.values")
    assert float(values[0, 0]) == 0.0
    assert torch.signbit(values[1, 0])
