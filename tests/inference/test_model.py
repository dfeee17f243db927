"""A loaded model computes what the trainer's does, keeps its sparse weights compressed, and trains nothing.

Run: pytest tests/inference/test_model.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from slope_dist.inference import InferenceModel
from slope_dist.inference.model import AppendedLinear, loss_in_layers
from slope_dist.models import Decoding
from slope_dist.sparse import CompressedMatrix, SparseWeight
from tests.export.models import MemoryModel, random_stored
from tests.models.twins import FORMS, VOCAB

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_the_trainer(form: str, adapters: bool, dtype: torch.dtype) -> None:
    stored = random_stored(form, adapters=adapters, dtype=dtype)
    model = InferenceModel(stored)
    tokens = torch.randint(VOCAB, (2, 30))
    with torch.no_grad():
        expected = stored.module.logits(tokens)
    found = model.logits(tokens)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_sparse_weights_stay_compressed_and_nothing_is_trained() -> None:
    stored = random_stored("llama", dtype=torch.bfloat16)
    model = InferenceModel(stored)
    weights = [module for module in model.module.modules() if isinstance(module, SparseWeight)]
    assert len(weights) == sum(form.pattern is not None for form in stored.linears.values()) > 0
    elements = sum(form.shape[0] * form.shape[1] for form in stored.linears.values() if form.pattern)
    assert sum(weight.values.nbytes + weight.indices.nbytes for weight in weights) == elements * 9 // 8
    dense = sum(form.shape[0] * form.shape[1] * 2 for form in stored.linears.values() if not form.pattern)
    assert model.linear_bytes == elements * 9 // 8 + dense
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    model.logits(torch.randint(VOCAB, (1, 8)))
    # A product's dense copy is gone with it.
    assert model.weight_bytes == sum(
        tensor.nbytes for tensor in {id(t): t for t in model.module.state_dict().values()}.values()
    )


def test_a_tied_head_is_the_embedding() -> None:
    tied, untied = (InferenceModel(random_stored(form)).module for form in ("llama tied", "llama"))
    assert tied.layers[-1].logits.weight is tied.layers[0].tokens.weight
    assert untied.layers[-1].logits.weight is not untied.layers[0].tokens.weight


def test_another_dtype_is_a_cast() -> None:
    stored = random_stored("opt")
    model = InferenceModel(stored, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.bfloat16}
    name = "decoder.layers.1.fc1"
    layer = next(module for module in model.module.modules() if getattr(module, "name", None) == name)
    assert torch.equal(layer.weight.values, stored.read(f"{name}.weight.values").bfloat16())
    assert torch.equal(layer.weight.indices, stored.read(f"{name}.weight.indices"))


class Appending(MemoryModel):
    """A model whose adapters' first factors are 2:4 and lie behind their weights."""

    def __init__(self, model: MemoryModel) -> None:
        super().__init__(model.module, model.model, model.dtype, None)
        with torch.no_grad():
            for name, form in self.linears.items():
                if form.adapter_rank:
                    down = self._tensors[f"{name}.adapter.down"]
                    assert form.pattern is not None
                    down.copy_(CompressedMatrix.prune(down, form.pattern).expand())
        self.linears = {name: replace(form, appended=form.adapter_rank > 0) for name, form in self.linears.items()}


@pytest.mark.parametrize("form", FORMS)
def test_an_appended_factor_gives_the_same_logits(form: str) -> None:
    stored = Appending(random_stored(form, adapters=True, rank=8))
    model = InferenceModel(stored)
    layers = [module for module in model.module.modules() if isinstance(module, AppendedLinear)]
    assert len(layers) == sum(form.appended for form in stored.linears.values()) > 0
    tokens = torch.randint(VOCAB, (2, 30))
    with torch.no_grad():
        expected = stored.module.logits(tokens)
    torch.testing.assert_close(model.logits(tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_layer_by_layer_is_that_of_the_whole(form: str) -> None:
    stored = random_stored(form, adapters=True)
    tokens, labels = torch.randint(VOCAB, (2, 2, 20))
    labels[0, :5] = -100
    logits = InferenceModel(stored).logits(tokens)
    expected = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert loss_in_layers(stored, tokens, labels) == pytest.approx(float(expected), rel=1e-6)


def test_sequences_go_on_from_a_cache() -> None:
    model = InferenceModel(random_stored("mistral", adapters=True))
    tokens = torch.randint(VOCAB, (2, 12))
    decoding = Decoding(torch.zeros(2, dtype=torch.int64), 12)
    parts = [model.logits(part, decoding) for part in tokens.split([7, 5], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.logits(tokens), rtol=1e-5, atol=1e-5)
