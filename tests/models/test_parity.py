"""Every family in dense mode gives Hugging Face transformers' logits within 1e-5 (fp32), with the same weights.

Weights are random and large enough that every bias, norm, projection and position shows in the logits.

Run: pytest tests/models/test_parity.py
"""

from __future__ import annotations

import pytest
import torch

from slope_dist.layers import logical_tensors
from slope_dist.models.attention import frequencies
from tests.models.twins import FORMS, LENGTH, VOCAB, random_model, twin_of


@pytest.mark.parametrize("length", [1, 17, LENGTH])
@pytest.mark.parametrize("form", FORMS)
def test_dense_logits_equal_transformers(form: str, length: int) -> None:
    model = random_model(FORMS[form])
    twin = twin_of(model, FORMS[form])
    tokens = torch.randint(VOCAB, (3, length))
    with torch.no_grad():
        ours, theirs = model.logits(tokens), twin(tokens).logits
    assert ours.shape == (3, length, VOCAB)
    assert ours.dtype == torch.float32
    assert float(theirs.std()) > 0.3
    assert float((ours - theirs).abs().max()) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_shows_in_the_logits(form: str) -> None:
    model = random_model(FORMS[form])
    tokens = (torch.arange(2 * LENGTH) % VOCAB).view(2, LENGTH)
    with torch.no_grad():
        before = model.logits(tokens)
        for tensor in logical_tensors(model):
            saved = tensor.tensor.clone()
            tensor.tensor.add_(torch.randn_like(saved))
            changed = float((model.logits(tokens) - before).abs().max()) > 1e-4
            tensor.tensor.copy_(saved)
            # q (k + b): the part of b is the same for every key, so softmax hides any key bias.
            assert changed != tensor.name.endswith("k_proj.bias"), tensor.name


@pytest.mark.parametrize("form", FORMS)
def test_no_token_sees_a_later_one(form: str) -> None:
    model = random_model(FORMS[form])
    tokens = torch.randint(VOCAB, (2, LENGTH))
    other = tokens.clone()
    other[:, 20:] = (other[:, 20:] + 1) % VOCAB
    with torch.no_grad():
        first, second = model.logits(tokens), model.logits(other)
    torch.testing.assert_close(first[:, :20], second[:, :20], rtol=1e-4, atol=1e-4)
    assert float((first[:, 20:] - second[:, 20:]).abs().max()) > 0.1


def test_the_scaled_form_has_slowed_mixed_and_kept_frequencies() -> None:
    shape = FORMS["llama scaled"].shape
    scaled = frequencies(shape.rotary, shape.head_size)
    plain = frequencies(type(shape.rotary)(base=shape.rotary.base), shape.head_size)
    ratio = plain / scaled
    assert {1.0, 8.0} <= set(ratio.tolist())
    assert ((ratio > 1.01) & (ratio < 7.99)).any()


def test_tables_first_made_in_inference_mode_serve_training() -> None:
    model = random_model(FORMS["llama"])
    tokens = torch.randint(VOCAB, (1, 23))
    with torch.inference_mode():
        model.logits(tokens)
    model.logits(tokens).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
