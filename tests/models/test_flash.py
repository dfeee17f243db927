"""Attention in training is asked for in the form that flash attention computes: causal, no mask, 16-bit heads.

Run: pytest tests/models/test_flash.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from slope_dist.layers import LayerFactory
from slope_dist.models import build_model
from tests.models.twins import FORMS

MOST_FEATURES = 256
"""Of a head, in flash attention."""


@pytest.mark.parametrize("form", FORMS)
def test_the_arguments_of_attention(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = FORMS[form].shape
    calls: list[tuple[tuple[Tensor, ...], Any, dict[str, Any]]] = []
    attend = functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        calls.append(((q, k, v), mask, options))
        return attend(q, k, v, mask, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    model = build_model(FORMS[form].family, shape, LayerFactory(seed=1, pattern=None)).bfloat16()
    tokens = torch.randint(shape.vocab_size, (2, shape.sequence_length))
    model(tokens, tokens).backward()
    assert len(calls) == shape.num_layers
    for operands, mask, options in calls:
        assert mask is None and options["is_causal"]
        assert not options.get("dropout_p")
        for operand in operands:
            assert operand.dtype == torch.bfloat16 and operand.stride(-1) == 1 and operand.shape[-1] <= MOST_FEATURES
        queries, keys = (operand.shape[1] for operand in operands[:2])
        # Groups are the kernel's to expand: no copy of keys and values a query head.
        assert options.get("enable_gqa", False) == (queries != keys)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("form", FORMS)
def test_flash_attention_takes_it(form: str) -> None:
    shape = FORMS[form].shape
    model = build_model(FORMS[form].family, shape, LayerFactory(seed=1, pattern=None)).to("cuda", torch.bfloat16)
    tokens = torch.randint(shape.vocab_size, (2, shape.sequence_length), device="cuda")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        model(tokens, tokens).backward()
