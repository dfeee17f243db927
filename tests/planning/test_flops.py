"""The arithmetic that is counted from shapes is what torch counts while a dense model runs; 2:4 models have the same.

Run: pytest tests/planning/test_flops.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slope_dist.layers import LayerFactory
from slope_dist.models import LanguageModel, build_model
from slope_dist.planning.flops import count_flops, model_flops_utilization
from slope_dist.planning.gpus import GPU_MEMORY, peaks_of
from slope_dist.sparse import Pattern
from tests.models.twins import FORMS

BATCH = 2


def model_of(form: str, *, sparse: bool = False, rank: int = 0, device: str = "meta") -> LanguageModel:
    pattern = Pattern(2, 4) if sparse else None
    factory = LayerFactory(seed=1, pattern=pattern, adapter_rank=rank, device=device)
    return build_model(FORMS[form].family, FORMS[form].shape, factory)


def counted_by_torch(model: LanguageModel, length: int, vocab: int) -> tuple[int, int]:
    """Operations of forward alone, and with backward, a token."""
    tokens = torch.randint(vocab, (BATCH, length))
    with FlopCounterMode(display=False) as forward:
        loss = model(tokens, tokens)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops() // tokens.numel(), backward.get_total_flops() // tokens.numel()


@pytest.mark.parametrize("form", FORMS)
def test_torch_counts_the_same(form: str) -> None:
    shape = FORMS[form].shape
    flops = count_flops(model_of(form), shape)
    # As plain products: fused attention on a CPU is no operator that torch counts.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        forward, backward = counted_by_torch(model_of(form, device="cpu"), shape.sequence_length, shape.vocab_size)
    assert 3 * forward == flops.dense_equivalent
    # Nothing needs the gradient of the tokens; all else has two products for one.
    assert forward + backward == flops.dense_equivalent


@pytest.mark.parametrize("form", FORMS)
def test_a_sparse_model_counts_as_the_dense_one_and_adapters_apart(form: str) -> None:
    shape = FORMS[form].shape
    dense, sparse, adapted = (
        count_flops(model_of(form, sparse=sparse, rank=rank), shape)
        for sparse, rank in ((False, 0), (True, 0), (True, 8))
    )
    assert sparse == dense and dense.adapters == 0
    assert adapted.dense_equivalent == dense.dense_equivalent
    elements = sum(
        parameter.numel()
        for name, parameter in model_of(form, sparse=True, rank=8).named_parameters()
        if "adapter" in name
    )
    assert adapted.adapters == 6 * elements > 0


def test_attention_grows_with_the_sequence() -> None:
    shape = FORMS["opt"].shape
    short, long = (count_flops(model_of("opt"), shape, length) for length in (10, 20))
    assert short.matrices == long.matrices and 2 * short.attention == long.attention
    assert replace(long, attention=0).dense_equivalent == long.matrices


def test_mfu_by_hand() -> None:
    # 6e9 operations a token x 1e5 tokens a second over 2 cards of 1e15.
    assert model_flops_utilization(6e9, 1e5, 1e15, 2) == pytest.approx(0.3)


def test_only_cards_known_by_their_whole_name_have_peaks() -> None:
    peaks = peaks_of("NVIDIA H200")
    assert peaks is not None and peaks.sparse == 2 * peaks.dense
    assert peaks_of("NVIDIA H200 MIG 1g.18gb") is None and peaks_of("Tesla T4") is None
    assert GPU_MEMORY == {"a100-40gb": 40e9, "a100-80gb": 80e9, "h100-80gb": 80e9, "h200-141gb": 141e9}
