"""A sparse language model: its loss, its masks in every dtype, and recomputation that changes no gradient.

Run: pytest tests/models/test_registry.py
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slope_dist.errors import UserError
from slope_dist.layers import LayerFactory, logical_tensors
from slope_dist.models import LanguageModel, ModelShape, build_model, family
from slope_dist.sparse import Pattern
from tests.sparse import oracle

SHAPE = ModelShape(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    ffn_size=64,
    vocab_size=61,
    sequence_length=16,
    embedding_size=32,
)


def sparse_model(*, recompute: bool = False, **options) -> LanguageModel:
    make = LayerFactory(seed=1, pattern=Pattern(2, 4), dense_layers=family("opt").dense_layers, **options)
    return build_model("opt", SHAPE, make, recompute=recompute)


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(SHAPE.vocab_size, (3, SHAPE.sequence_length + 1))
    return tokens[:, :-1], tokens[:, 1:]


def test_an_unknown_family_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r'"bert".*opt, gpt2, llama, mistral'):
        family("bert")
    with pytest.raises(UserError, match='"bert"'):
        build_model("bert", SHAPE, LayerFactory(seed=1, pattern=None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_mean_negative_log_likelihood_in_fp32(dtype: torch.dtype) -> None:
    model, (tokens, labels) = sparse_model().to(dtype), batch()
    with torch.no_grad():
        loss, logits = model(tokens, labels), model.logits(tokens).double()
    likelihood = torch.softmax(logits, dim=2).gather(2, labels.unsqueeze(2))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(-likelihood.log().mean()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_masks_do_not_depend_on_the_dtype(dtype: torch.dtype) -> None:
    reference, cast = sparse_model(), sparse_model().to(dtype)
    compared = 0
    for ours, other in zip(logical_tensors(reference), logical_tensors(cast), strict=True):
        assert ours.name == other.name
        if ours.trained:
            assert other.tensor.dtype == dtype
            assert oracle.same_bits(ours.tensor.detach().to(dtype), other.tensor.detach())
        else:
            assert oracle.same_bits(ours.tensor, other.tensor)
            compared += 1
    assert compared == 9


OPTIONS: dict[str, dict] = {
    "derived": {},
    "held mask": {"hold_column_mask": True},
    "resident": {"resident_transpose": True},
    "adapters": {"adapter_rank": 16},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_recomputation_gives_the_same_loss_and_gradients_to_the_bit(name: str) -> None:
    tokens, labels = batch()
    results = []
    for recompute in (False, True):
        model = sparse_model(recompute=recompute, **OPTIONS[name])
        calls = count_block_calls(model)
        loss = model(tokens, labels)
        loss.backward()
        # Otherwise equal gradients would show nothing.
        assert calls == [2 if recompute else 1] * SHAPE.num_layers
        results.append([loss.detach()] + [oracle.gradient(p) for p in model.parameters()])
    for plain, recomputed in zip(*results, strict=True):
        assert oracle.same_bits(plain, recomputed)


def test_evaluation_never_recomputes() -> None:
    model = sparse_model(recompute=True).eval()
    calls = count_block_calls(model)
    loss = model(*batch())
    loss.backward()
    assert calls == [1] * SHAPE.num_layers


def count_block_calls(model: LanguageModel) -> list[int]:
    """How often each block has run its attention, counted live."""
    blocks = list(model.layers)[1:-1]
    calls = [0] * len(blocks)
    for index, block in enumerate(blocks):

        def count(module: nn.Module, inputs: tuple, index: int = index) -> None:
            calls[index] += 1

        block.get_submodule("q").register_forward_pre_hook(count)
    return calls


def test_every_trained_tensor_receives_a_gradient_of_its_own_shape() -> None:
    model = sparse_model(adapter_rank=16)
    with torch.no_grad():
        for tensor in logical_tensors(model):
            if tensor.name.endswith("adapter.up"):
                tensor.tensor.normal_()
    model(*batch()).backward()
    for tensor in logical_tensors(model):
        if tensor.trained:
            gradient = oracle.gradient(tensor.tensor)
            assert gradient.shape == tensor.shape and gradient.any(), tensor.name
        else:
            assert tensor.tensor.grad is None


def test_adapters_leave_the_loss_and_the_other_gradients_as_they_were() -> None:
    tokens, labels = batch()
    plain, adapted = sparse_model(), sparse_model(adapter_rank=16)
    losses = [model(tokens, labels) for model in (plain, adapted)]
    for loss in losses:
        loss.backward()
    assert losses[0].equal(losses[1])
    gradients = {name: oracle.gradient(p) for name, p in adapted.named_parameters()}
    for name, parameter in plain.named_parameters():
        assert oracle.gradient(parameter).equal(gradients[name]), name
