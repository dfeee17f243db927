"""PEFT's adapters beside a model of Hugging Face's form, ours and others', are read as the adapters that they are; one
of another base, one that does not fit, and one that does what ours do not, is refused in one line.

Run: pytest tests/export/test_peft_reader.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from slope_dist.export.huggingface_model import HuggingFaceModel
from tests.export.damage import ADAPTER, WEIGHTS, edit, refused, rewrite, spoilt
from tests.export.hugging_face import EXACT, difference, exported, ours, relative, theirs, with_adapter
from tests.export.models import random_stored
from tests.models.twins import FORMS, random_model, twin_of

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

GATE = "model.layers.1.mlp.gate_proj.weight"


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


@pytest.mark.parametrize("names", [("q_proj", "layers.1.self_attn.q_proj"), ("layers.1.self_attn.q_proj", "q_proj")])
def test_of_two_names_that_mean_a_layer_the_first_holds(names: tuple[str, str], tmp_path: Path) -> None:
    twin = twin_of(random_model(FORMS["llama"]), FORMS["llama"])
    twin.save_pretrained(tmp_path / "hf")
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(twin, config).save_pretrained(tmp_path / "hf" / "adapter")
    # PEFT saves them in order of name, others as they were.
    numbers = dict(zip(names, (2, 64), strict=True))
    edit(tmp_path / "hf" / "adapter" / "adapter_config.json", lambda config: config.update(alpha_pattern=numbers))
    found, expected = ours(HuggingFaceModel(tmp_path / "hf")), theirs(with_adapter(tmp_path / "hf"))
    assert relative(found, expected) < EXACT


def test_an_adapter_of_another_base_is_refused(copy, hugging_face_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy("llama")
    rewrite(folder / WEIGHTS, spoilt(GATE, lambda tensor: tensor + 1))
    refused(folder, f"{ADAPTER} is an adapter of another base: expected weights with identity")
    shutil.rmtree(folder / "adapter")
    shutil.copytree(hugging_face_folders["llama scaled"] / "adapter", folder / "adapter")
    refused(folder, "is an adapter of another base")
    # One that says nothing of its base is known by its shapes alone.
    for form, expected in (
        ("llama scaled", "expected factors [r, 64] and [32, r]"),
        ("opt", "has no such linear layer"),
    ):
        shutil.rmtree(folder / "adapter")
        shutil.copytree(hugging_face_folders[form] / "adapter", folder / "adapter")
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
        (
            "rank_pattern",
            {"q_proj|v_proj": 4},
            "rank_pattern: expected names of linear layers of the base, found q_pro",
        ),
        (
            "alpha_pattern",
            {"^model.*\\.q_proj": 2, "x\x1b": 1},
            "alpha_pattern: expected names of linear layers of the",
        ),
        ("init_lora_weights", "olora", 'init_lora_weights is "olora"; our model has one of true, false, "gaussian"'),
        ("init_lora_weights", "pissa_niter_4", 'init_lora_weights is "pissa_niter_4"; our model has one of'),
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
    layer, other = (f"transformer.h.1.attn.{kind}_proj" for kind in "qk")
    own = {name: 4 for name, form in random_stored("gpt2", adapters=True).linears.items() if form.adapter_rank}
    for ranks, expected in (
        ("rubbish", "ranks: expected ranks of linear layers of the base"),
        (json.dumps({"other": 4}), "ranks: expected ranks of linear layers of the base"),
        (json.dumps({layer: -4}), "ranks: expected ranks of linear layers of the base"),
        (json.dumps({layer: 4}), "c_proj has an adapter that they do not name"),
        (json.dumps(own | {layer: 20}), "c_attn: the header's ranks do not fit rank 12"),
        (json.dumps(own | {"transformer.h.0.attn.q_proj": 4}), "ranks name layers that have no adapter"),
    ):
        rewrite(folder / ADAPTER, lambda factors: None, {"ranks": ranks})
        refused(folder, expected)
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
