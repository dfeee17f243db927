"""Claims: in training every family gives torch's attention what its flash kernel takes (no mask but causality, grouped
heads by torch's own option, one 16-bit dtype, features side by side), and on a GPU that kernel does take it.

Run: pytest tests/models/test_attention.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from slope_dist.models import Decoding
from tests.models.twins import FORMS, Form, random_model

BATCH, LENGTH = 2, 24


def batch(form: Form, device: str = "cpu") -> torch.Tensor:
    return torch.randint(form.shape.vocab_size, (2, BATCH, LENGTH), device=device)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What attention is called with."""
    seen: list[dict[str, Any]] = []
    right = functional.scaled_dot_product_attention

    def spy(q: Any, k: Any, v: Any, attn_mask: Any = None, **options: Any) -> torch.Tensor:
        seen.append({"q": q, "k": k, "v": v, "mask": attn_mask} | options)
        return right(q, k, v, attn_mask, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    return seen


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_training_asks_for_what_flash_can_do(name: str, recompute: bool, calls: list[dict[str, Any]]) -> None:
    form = FORMS[name]
    model = random_model(form).to(torch.bfloat16)
    model.recompute = recompute
    model(*batch(form)).backward()
    heads, groups, size = form.shape.num_heads, form.shape.kv_heads, form.shape.head_size
    assert len(calls) == form.shape.num_layers * (1 + recompute)
    for call in calls:
        assert call["mask"] is None and call["is_causal"] is True and call.get("dropout_p", 0.0) == 0.0
        assert call["enable_gqa"] is (heads != groups)
        assert call["q"].shape == (BATCH, heads, LENGTH, size)
        assert call["k"].shape == call["v"].shape == (BATCH, groups, LENGTH, size)
        for tensor in (call["q"], call["k"], call["v"]):
            assert tensor.dtype == torch.bfloat16 and tensor.stride(-1) == 1


@pytest.mark.parametrize("name", ["opt", "mistral"])
def test_parts_of_a_sequence_have_a_mask(name: str, calls: list[dict[str, Any]]) -> None:
    """Which flash cannot take: only generation and evaluation by parts pay for it."""
    form = FORMS[name]
    with torch.inference_mode():
        random_model(form).logits(batch(form)[0], Decoding(torch.zeros(BATCH, dtype=torch.int64), LENGTH))
    assert calls and all(call["mask"] is not None and not call["is_causal"] for call in calls)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_flash_takes_it(name: str, dtype: torch.dtype) -> None:
    form = FORMS[name]
    model = random_model(form)
    tokens = batch(form)
    exact = model.double().logits(tokens[0])
    model = model.to("cuda", dtype)
    # With the others forbidden torch raises where flash cannot.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        logits = model.logits(tokens[0].cuda())
        model(*tokens.cuda()).backward()
    assert (logits.double().cpu() - exact).norm() < 0.05 * exact.norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
