"""Claims: the arithmetic counted for MFU is what torch counts in the dense model, forward and with backward, and the
same for a 2:4 model; adapters come to it and are kept apart; the peaks are what the cards' clocks allow.

Run: pytest tests/planning/test_flops.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slope_dist.layers import LayerFactory
from slope_dist.layers.linear import LowRankAdapter
from slope_dist.models import build_model, family
from slope_dist.planning import flops, gpus
from slope_dist.sparse import Pattern
from tests.models.twins import FORMS, Form

BATCH, LENGTH = 2, 48


def model_of(form: Form, *, sparse: bool = False, rank: int = 0, device: str = "meta") -> nn.Module:
    factory = LayerFactory(
        seed=1,
        pattern=Pattern(2, 4) if sparse else None,
        dense_layers=family(form.family).dense_layers,
        adapter_rank=rank,
        device=device,
    )
    return build_model(form.family, form.shape, factory)


def counted(work: nn.Module, *inputs: torch.Tensor, backward: bool) -> int:
    """By torch. In its plain form attention is products that are counted one by one, in backward each once."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = work(*inputs)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", FORMS)
def test_torch_counts_the_same(name: str) -> None:
    form = FORMS[name]
    count = flops.count_flops(model_of(form), form.shape, LENGTH)
    tokens = torch.randint(form.shape.vocab_size, (2, BATCH, LENGTH))
    model = model_of(form, device="cpu")
    total = count.dense_equivalent * BATCH * LENGTH
    assert counted(model, *tokens, backward=False) * 3 == total
    assert counted(model, *tokens, backward=True) == total
    assert count.adapters == 0


@pytest.mark.parametrize("name", FORMS)
def test_a_sparse_model_counts_as_the_dense_one(name: str) -> None:
    form = FORMS[name]
    dense = flops.count_flops(model_of(form), form.shape)
    assert flops.count_flops(model_of(form, sparse=True), form.shape) == dense
    with_adapters = flops.count_flops(model_of(form, sparse=True, rank=16), form.shape)
    assert with_adapters.dense_equivalent == dense.dense_equivalent and with_adapters.adapters > 0


@pytest.mark.parametrize("name", FORMS)
def test_adapters_are_what_torch_counts_in_them(name: str) -> None:
    form = FORMS[name]
    model = model_of(form, sparse=True, rank=16, device="cpu")
    total = 0
    for module in model.modules():
        if isinstance(module, LowRankAdapter):
            x = torch.randn(5, module.down.shape[1], requires_grad=True)
            total += counted(module, x, backward=True)
    assert total == flops.count_flops(model, form.shape).adapters * 5


def test_attention_grows_with_the_length_alone() -> None:
    form = FORMS["llama"]
    short, long = (flops.count_flops(model_of(form), form.shape, length) for length in (32, 64))
    assert long.attention == 2 * short.attention == 12 * form.shape.num_layers * form.shape.hidden_size * 64
    assert long.matrices == short.matrices
    own = flops.count_flops(model_of(form), replace(form.shape, sequence_length=64))
    assert own == long


def test_utilization_is_of_all_cards() -> None:
    assert flops.model_flops_utilization(2e9, 1000, 1e13) == pytest.approx(0.2)
    assert flops.model_flops_utilization(2e9, 1000, 1e13, 4) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("card", "processors", "a_clock", "hertz"),
    [
        ("NVIDIA A100-SXM4-80GB", 108, 2048, 1.41e9),
        ("NVIDIA H100 80GB HBM3", 132, 4096, 1.83e9),
        ("NVIDIA H100 PCIe", 114, 4096, 1.62e9),
        ("NVIDIA H200", 132, 4096, 1.83e9),
    ],
)
def test_peaks_are_what_the_clocks_allow(card: str, processors: int, a_clock: int, hertz: float) -> None:
    peaks = gpus.peaks_of(card)
    assert peaks is not None and peaks.dense == pytest.approx(processors * a_clock * hertz, rel=1e-3)
    assert peaks.sparse == 2 * peaks.dense


@pytest.mark.parametrize("card", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H200 NVL", "H100", "a GPU"])
def test_other_cards_are_unknown(card: str) -> None:
    assert gpus.peaks_of(card) is None
