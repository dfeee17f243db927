"""Adapters written beside a model load in PEFT with no missing or unexpected tensor and give the trainer's logits,
padded to a rank of vLLM's or not; vLLM's loader, which cannot run here, would take them: its rules are applied.

Run: pytest tests/export/test_peft.py
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from slope_dist.export.exporting import convert
from slope_dist.export.opening import open_model
from slope_dist.export.options import Options
from slope_dist.export.proof import WrongExportError, check_same
from slope_dist.transfer import Transfer
from tests.export.hugging_face import (
    EXACT,
    TOKENS,
    difference,
    exported,
    loaded,
    ours,
    relative,
    roundings,
    theirs,
    with_adapter,
)
from tests.export.models import RANK, random_stored
from tests.models.twins import FORMS

VLLM_RANKS = {1, 8, 16, 32, 64, 128, 256, 320, 512}
PROJECTIONS = {
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
}
PROJECTIONS["mistral"] = PROJECTIONS["llama"]


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter" / "adapter_config.json").read_text())


def factors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("form", FORMS)
def test_peft_gives_the_trainers_logits(form: str, tmp_path: Path) -> None:
    stored = random_stored(form, adapters=True)
    exported(stored, tmp_path / "hf")
    exported(stored, tmp_path / "padded", pad_adapters=True)
    with torch.inference_mode():
        trainers = stored.module.logits(TOKENS)
    found, padded = theirs(with_adapter(tmp_path / "hf")), theirs(with_adapter(tmp_path / "padded"))
    assert difference(found, trainers) < EXACT
    assert difference(padded, trainers) < EXACT
    assert difference(found, ours(stored)) < EXACT
    # The adapters matter, and the weights beside them are those of the model without.
    assert difference(theirs(loaded(tmp_path / "hf")), trainers) > 0.5
    exported(random_stored(form, adapters=True), tmp_path / "merged", merge_adapters=True)
    assert difference(theirs(loaded(tmp_path / "merged")), found) < 2 * EXACT


@pytest.mark.parametrize("form", ["opt", "gpt2", "llama"])
def test_half_precision_differs_by_roundings(form: str, tmp_path: Path) -> None:
    stored = random_stored(form, adapters=True, dtype=torch.bfloat16, rank=3)
    for pad in (False, True):
        exported(stored, tmp_path / str(pad), pad_adapters=pad)
        assert all(factor.dtype == torch.bfloat16 for factor in factors_of(tmp_path / str(pad)).values())
        assert relative(theirs(with_adapter(tmp_path / str(pad))), ours(stored)) < roundings(torch.bfloat16)


@pytest.mark.parametrize("form", FORMS)
def test_exactly_the_sparse_layers_have_one(form: str, tmp_path: Path) -> None:
    stored = random_stored(form, adapters=True)
    exported(stored, tmp_path / "hf")
    factors = factors_of(tmp_path / "hf")
    modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in factors}
    sparse = [name for name, linear in stored.linears.items() if linear.pattern is not None]
    if stored.model.family == "gpt2":
        sparse = [re.sub(r"\.[qkv]_proj$", ".c_attn", name) for name in sparse]
    assert modules == {f"model.{name}" if stored.model.family == "opt" else name for name in sparse}
    assert set(config_of(tmp_path / "hf")["target_modules"]) == modules
    assert len(factors) == 2 * len(modules)


def test_gpt2s_three_adapters_become_one(tmp_path: Path) -> None:
    stored = random_stored("gpt2", adapters=True)
    # As a run leaves it in which all keys are kept dense.
    key = "transformer.h.2.attn.k_proj"
    stored.linears[key] = replace(stored.linears[key], adapter_rank=0)
    exported(stored, tmp_path / "hf")
    config, factors = config_of(tmp_path / "hf"), factors_of(tmp_path / "hf")
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (RANK, 1, True)
    joined = {f"transformer.h.{block}.attn.c_attn": count for block, count in ((1, 3), (2, 2))}
    assert config["rank_pattern"] == {name: count * RANK for name, count in joined.items()}
    assert config["alpha_pattern"] == joined
    second = factors["base_model.model.transformer.h.2.attn.c_attn.lora_B.weight"]
    assert second.shape == (3 * 64, 2 * RANK)
    up = stored.read("transformer.h.2.attn.v_proj.adapter.up")
    assert torch.equal(second[128:], torch.cat([torch.zeros_like(up), up], dim=1))
    assert not second[64:128].any()
    assert difference(theirs(with_adapter(tmp_path / "hf")), ours(stored)) < EXACT
    exported(stored, tmp_path / "padded", pad_adapters=True)
    assert difference(theirs(with_adapter(tmp_path / "padded")), ours(stored)) < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpt2s_three_adapters_may_have_other_ranks(dtype: torch.dtype, tmp_path: Path) -> None:
    stored = random_stored("gpt2", adapters=True, rank=5, dtype=dtype)
    key = "transformer.h.1.attn.k_proj"
    stored.linears[key] = replace(stored.linears[key], adapter_rank=3)
    down, up = (stored._tensors[f"{key}.adapter.{factor}"] for factor in ("down", "up"))
    stored._tensors |= {f"{key}.adapter.down": down[:3].clone(), f"{key}.adapter.up": up[:, :3].clone()}
    # The proof knows that this rounds the second factors.
    convert(stored, "hf", tmp_path / "hf", Options(tokenizer=False), Transfer(), Transfer())
    found = open_model(tmp_path / "hf")
    assert found.linears == {name: replace(form, pattern=None) for name, form in stored.linears.items()}
    bound = EXACT if dtype == torch.float32 else roundings(dtype)
    assert relative(theirs(with_adapter(tmp_path / "hf")), ours(stored)) < bound
    stored._tensors[f"{key}.adapter.up"] *= 1.1
    with pytest.raises(WrongExportError, match=f"{key}.adapter: it adds something else than it did"):
        check_same(stored, found, Options(), Transfer())


@pytest.mark.parametrize(("rank", "padded"), [(1, 1), (5, 8), (8, 8), (9, 16), (49, 64)])
def test_padding_goes_to_the_next_rank_of_vllms(rank: int, padded: int, tmp_path: Path) -> None:
    stored = random_stored("llama", adapters=True, rank=rank)
    exported(stored, tmp_path / "hf")
    lines = exported(stored, tmp_path / "padded", pad_adapters=True)
    plain, config = config_of(tmp_path / "hf"), config_of(tmp_path / "padded")
    assert (plain["r"], plain["lora_alpha"]) == (rank, 1)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (
        padded,
        padded,
        {},
        {},
    )
    assert any(f"--max-lora-rank {padded}" in line for line in lines)
    wide = factors_of(tmp_path / "padded")
    for name, factor in factors_of(tmp_path / "hf").items():
        if name.endswith("lora_A.weight"):
            assert torch.equal(wide[name][:rank], factor)
            assert not wide[name][rank:].any()
        else:
            assert torch.equal(wide[name][:, :rank], factor * (1 / rank))
            assert not wide[name][:, rank:].any()


def test_a_rank_that_vllm_does_not_know_is_told(tmp_path: Path) -> None:
    def told(form: str, rank: int, **options: bool) -> str:
        folder = tmp_path / f"{form} {rank} {options}"
        lines = exported(random_stored(form, adapters=True, rank=rank), folder, **options)
        return next(line for line in lines if "vLLM" in line)

    assert told("opt", 4).endswith("--pad-adapters writes rank 8")
    assert told("opt", 4, pad_adapters=True).endswith("--max-lora-rank 8")
    assert told("opt", 8).endswith("--max-lora-rank 8")
    assert "512 at most" in told("opt", 600)
    assert "GPT-2 without adapters only" in told("gpt2", 16)


def accepted_by_vllm(folder: Path, family: str, max_lora_rank: int) -> None:
    """What vLLM 0.33 asks of a LoRA adapter, and of the weights of its base."""
    config = config_of(folder)
    assert max_lora_rank in VLLM_RANKS
    assert isinstance(config["r"], int)
    assert isinstance(config["lora_alpha"], int)
    assert max([config["r"], *config["rank_pattern"].values()]) <= max_lora_rank
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None
    assert config["init_lora_weights"] is True
    assert not config["use_dora"]
    assert not any(config.get(name) for name in ("lora_bias", "layer_replication", "alora_invocation_tokens"))
    assert not any(config.get(name) for name in ("use_bdlora", "use_qalora", "trainable_token_indices"))
    assert all(name.rpartition(".")[2] in PROJECTIONS[family] for name in config["target_modules"])
    weights: dict[str, list[int]] = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "pt"
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                assert name not in weights
                weights[name] = file.get_slice(name).get_shape()
    index = folder / "model.safetensors.index.json"
    assert (set(json.loads(index.read_text())["weight_map"]) if index.exists() else set(weights)) == set(weights)
    # It joins these itself, from names that transformers has too.
    assert not any(part in name for name in weights for part in ("qkv_proj", "gate_up_proj"))
    factors = factors_of(folder)
    found: dict[str, set[str]] = {}
    for name in factors:
        *module, factor, kind = name.removeprefix("base_model.model.").split(".")
        assert name.startswith("base_model.model.")
        assert (factor, kind) in (("lora_A", "weight"), ("lora_B", "weight"))
        assert module[-1] in PROJECTIONS[family]
        found.setdefault(".".join(module), set()).add(factor)
    for module, both in found.items():
        assert both == {"lora_A", "lora_B"}
        first, second = (factors[f"base_model.model.{module}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
        shape = weights[f"{module}.weight"]
        assert [second.shape[0], first.shape[1]] == (shape[::-1] if family == "gpt2" else shape)
        assert first.shape[0] == second.shape[1] <= max_lora_rank


@pytest.mark.parametrize("form", FORMS)
def test_vllms_rules_hold(form: str, tmp_path: Path) -> None:
    stored = random_stored(form, adapters=True)
    family = stored.model.family
    exported(stored, tmp_path / "hf", pad_adapters=True, shard_bytes=100_000)
    config = config_of(tmp_path / "hf")
    accepted_by_vllm(tmp_path / "hf", family, max_lora_rank=config["r"])
    # Versions that do not read patterns of ranks find one rank everywhere.
    assert all(min(factor.shape) == config["r"] for factor in factors_of(tmp_path / "hf").values())
    exported(stored, tmp_path / "unpadded")
    accepted_by_vllm(tmp_path / "unpadded", family, max_lora_rank=16)
    with pytest.raises(AssertionError):
        accepted_by_vllm(tmp_path / "unpadded", family, max_lora_rank=1)
