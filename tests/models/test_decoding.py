"""Sequences fed in parts, their keys and values kept, have the logits of the whole; padding before them changes none.

Attention is asked for in forms that fused kernels take: without a mask where none is needed, and never with a mask and
grouped queries at once.

Run: pytest tests/models/test_decoding.py
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from slope_dist.models import Decoding
from tests.models.twins import FORMS, VOCAB, random_model

LENGTH = 40


def no_padding(sequences: int) -> torch.Tensor:
    return torch.zeros(sequences, dtype=torch.int64)


@pytest.mark.parametrize("cuts", [(17, 18, 19), (1, 39), ()])
@pytest.mark.parametrize("form", FORMS)
def test_parts_have_the_logits_of_the_whole(form: str, cuts: tuple[int, ...]) -> None:
    model = random_model(FORMS[form]).eval()
    tokens = torch.randint(VOCAB, (3, LENGTH))
    bounds = [0, *cuts, LENGTH]
    with torch.inference_mode():
        whole = model.logits(tokens)
        decoding = Decoding(no_padding(3), LENGTH)
        parts = [model.logits(tokens[:, a:b], decoding) for a, b in pairwise(bounds)]
    assert decoding.seen == LENGTH
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_padding_is_not_seen(form: str) -> None:
    model = random_model(FORMS[form]).eval()
    padding = torch.tensor([0, 5, 29])
    tokens = torch.randint(VOCAB, (3, LENGTH))
    with torch.inference_mode():
        decoding = Decoding(padding, LENGTH)
        first, last = model.logits(tokens[:, :30], decoding), model.logits(tokens[:, 30:], decoding)
        found = torch.cat([first, last], dim=1)
        assert not found.isnan().any()
        for row, skipped in enumerate(padding.tolist()):
            alone = model.logits(tokens[row : row + 1, skipped:])
            torch.testing.assert_close(found[row, skipped:], alone[0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_arguments_of_attention(form: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, bool, bool]] = []
    attend = functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        grouped = options.get("enable_gqa", False)
        assert grouped == (q.shape[1] != k.shape[1]) and not (grouped and mask is not None)
        asked.append((mask is not None, options.get("is_causal", False), q.shape[2] > 1))
        return attend(q, k, v, mask, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    model = random_model(FORMS[form]).eval()
    tokens, layers = torch.randint(VOCAB, (2, LENGTH)), FORMS[form].shape.num_layers
    with torch.inference_mode():
        decoding = Decoding(torch.tensor([0, 3 if padded else 0]), LENGTH)
        for start, stop in ((0, 20), (20, 30), (30, 31)):
            model.logits(tokens[:, start:stop], decoding)
    first, later, one = asked[0], asked[layers], asked[2 * layers]
    assert later[:2] == (True, False)
    assert (first[:2], one[:2]) == (((True, False),) * 2 if padded else ((False, True), (False, False)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("form", FORMS)
def test_fused_kernels_take_it(form: str, padding: int) -> None:
    model = random_model(FORMS[form]).eval().to("cuda", torch.bfloat16)
    tokens = torch.randint(VOCAB, (2, LENGTH), device="cuda")
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with torch.inference_mode(), sdpa_kernel(backends):
        decoding = Decoding(torch.tensor([0, padding], device="cuda"), LENGTH)
        for start, stop in ((0, 20), (20, 30), (30, 31)):
            assert model.logits(tokens[:, start:stop], decoding).isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_some_sequences_go_on_without_the_others(form: str) -> None:
    model = random_model(FORMS[form]).eval()
    tokens = torch.randint(VOCAB, (4, LENGTH))
    rows = torch.tensor([3, 1])
    with torch.inference_mode():
        decoding = Decoding(torch.tensor([0, 5, 9, 2]), LENGTH)
        model.logits(tokens[:, :20], decoding)
        decoding.keep(rows)
        found = model.logits(tokens[rows, 20:], decoding)
        for row, padding, logits in ((3, 2, found[0]), (1, 5, found[1])):
            alone = model.logits(tokens[row : row + 1, padding:])[0, 20 - padding :]
            torch.testing.assert_close(logits, alone, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_logits_from_a_place_on_are_the_last_of_all(form: str) -> None:
    model = random_model(FORMS[form]).eval()
    tokens = torch.randint(VOCAB, (2, LENGTH))
    with torch.inference_mode():
        whole = model.logits(tokens)
        torch.testing.assert_close(model.logits(tokens, since=33), whole[:, 33:], rtol=1e-5, atol=2e-5)
        cached = model.logits(tokens, Decoding(no_padding(2), LENGTH), since=39)
        torch.testing.assert_close(cached, whole[:, 39:], rtol=1e-5, atol=2e-5)


def test_the_cache_holds_what_it_was_made_for() -> None:
    model = random_model(FORMS["llama"]).eval()
    shape = FORMS["llama"].shape
    decoding = Decoding(no_padding(2), 8)
    assert decoding.bytes == 0
    with torch.inference_mode():
        model.logits(torch.randint(VOCAB, (2, 5)), decoding)
        # Keys and values of the few grouped heads, fp32, for every block.
        assert decoding.bytes == 2 * shape.num_layers * 2 * shape.kv_heads * 8 * shape.head_size * 4
        with pytest.raises(ValueError, match="9 tokens do not fit into a cache of 8"):
            model.logits(torch.randint(VOCAB, (2, 4)), decoding)
    assert decoding.seen == 5
