"""OPT in dense mode gives Hugging Face transformers' logits within 1e-5 (fp32), in the pre-norm and in the 350M form.

Weights are random and large enough that every bias, norm and projection shows in the logits.

Run: pytest tests/models/test_opt.py
"""

from __future__ import annotations

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from slope_dist.layers import LayerFactory, logical_tensors
from slope_dist.models import LanguageModel, ModelShape, build_model, family
from slope_dist.sparse import Pattern

VOCAB, LENGTH = 97, 40

PRE_NORM = ModelShape(
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    ffn_size=160,
    vocab_size=VOCAB,
    sequence_length=LENGTH,
    embedding_size=64,
)
FORM_OF_350M = ModelShape(
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    ffn_size=256,
    vocab_size=VOCAB,
    sequence_length=LENGTH,
    embedding_size=32,
    norm_position="post",
)
SHAPES = {"pre-norm": PRE_NORM, "350M form": FORM_OF_350M}


def dense_model(shape: ModelShape) -> LanguageModel:
    """With every tensor random: norms about one, the others wide."""
    model = build_model("opt", shape, LayerFactory(seed=1, pattern=None))
    with torch.no_grad():
        for tensor in logical_tensors(model):
            around = 1.0 if "norm" in tensor.name and tensor.name.endswith(".weight") else 0.0
            tensor.tensor.normal_(around, 0.2)
    return model


def hugging_face_twin(model: LanguageModel, shape: ModelShape) -> OPTForCausalLM:
    """transformers' OPT with the same weights; the map of names is a prefix and a suffix."""
    config = OPTConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        ffn_dim=shape.ffn_size,
        max_position_embeddings=shape.sequence_length,
        num_attention_heads=shape.num_heads,
        word_embed_proj_dim=shape.embedding_size,
        do_layer_norm_before=shape.norm_position == "pre",
        activation_function="relu",
        dropout=0.0,
        attention_dropout=0.0,
    )
    twin = OPTForCausalLM(config)
    state = {
        "model." + tensor.name.replace(".weight.values", ".weight"): tensor.tensor.detach().clone()
        for tensor in logical_tensors(model)
    }
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected
    # The tied head is the embedding; transformers counts it as missing and keeps the tie.
    assert set(missing) <= {"lm_head.weight"}
    assert twin.lm_head.weight.data_ptr() == twin.model.decoder.embed_tokens.weight.data_ptr()
    return twin.eval()


@pytest.mark.parametrize("length", [1, 17, LENGTH])
@pytest.mark.parametrize("form", SHAPES)
def test_dense_logits_equal_transformers(form: str, length: int) -> None:
    shape = SHAPES[form]
    model = dense_model(shape)
    twin = hugging_face_twin(model, shape)
    tokens = torch.randint(VOCAB, (3, length))
    with torch.no_grad():
        ours, theirs = model.logits(tokens), twin(tokens).logits
    assert ours.shape == (3, length, VOCAB)
    assert ours.dtype == torch.float32
    assert float(theirs.std()) > 0.3
    assert float((ours - theirs).abs().max()) < 1e-5


@pytest.mark.parametrize("form", SHAPES)
def test_every_tensor_shows_in_the_logits(form: str) -> None:
    shape = SHAPES[form]
    model = dense_model(shape)
    tokens = torch.arange(VOCAB)[: 2 * LENGTH].view(2, LENGTH)
    with torch.no_grad():
        before = model.logits(tokens)
        for tensor in logical_tensors(model):
            saved = tensor.tensor.clone()
            tensor.tensor.add_(torch.randn_like(saved))
            changed = float((model.logits(tokens) - before).abs().max()) > 1e-4
            tensor.tensor.copy_(saved)
            # q (k + b): the part of b is the same for every key, so softmax hides any key bias.
            assert changed != tensor.name.endswith("k_proj.bias"), tensor.name


def test_the_350m_form_has_projections_and_no_final_norm() -> None:
    names = {tensor.name for tensor in logical_tensors(dense_model(FORM_OF_350M))}
    assert {"decoder.project_in.weight.values", "decoder.project_out.weight.values"} <= names
    assert "decoder.project_in.bias" not in names and "decoder.project_out.bias" not in names
    assert "decoder.final_layer_norm.weight" not in names
    assert "decoder.final_layer_norm.weight" in {tensor.name for tensor in logical_tensors(dense_model(PRE_NORM))}


@pytest.mark.parametrize("form", SHAPES)
def test_no_token_sees_a_later_one(form: str) -> None:
    model = dense_model(SHAPES[form])
    tokens = torch.randint(VOCAB, (2, LENGTH))
    other = tokens.clone()
    other[:, 20:] = (other[:, 20:] + 1) % VOCAB
    with torch.no_grad():
        first, second = model.logits(tokens), model.logits(other)
    torch.testing.assert_close(first[:, :20], second[:, :20])
    assert float((first[:, 20:] - second[:, 20:]).abs().max()) > 0.1


def test_position_rows_begin_at_two() -> None:
    model = dense_model(PRE_NORM)
    table = {tensor.name: tensor.tensor for tensor in logical_tensors(model)}["decoder.embed_positions.weight"]
    assert table.shape == (LENGTH + 2, 64)
    tokens = torch.randint(VOCAB, (1, LENGTH))
    with torch.no_grad():
        before = model.logits(tokens)
        table[:2] = float("nan")
        assert model.logits(tokens).equal(before)


def test_the_first_linears_after_the_input_are_dense() -> None:
    shape = ModelShape(
        hidden_size=32,
        num_layers=8,
        num_heads=4,
        ffn_size=64,
        vocab_size=VOCAB,
        sequence_length=8,
        embedding_size=32,
    )
    make = LayerFactory(seed=1, pattern=Pattern(2, 4), dense_layers=family("opt").dense_layers)
    build_model("opt", shape, make)
    assert make.summary().startswith("sparse 45/48 linears; dense: decoder.layers.0")
    assert set(make.dense) == {f"decoder.layers.0.self_attn.{letter}_proj" for letter in "qkv"}
    assert set(make.dense.values()) == {"first after the input"}


def test_the_350m_projections_are_dense_too() -> None:
    make = LayerFactory(seed=1, pattern=Pattern(2, 4), dense_layers=family("opt").dense_layers)
    build_model("opt", FORM_OF_350M, make)
    assert make.dense["decoder.project_in"] == "outside the blocks"
    assert make.dense["decoder.project_out"] == "outside the blocks"
    assert len(make.sparse) == 6 * 3 - 3


def test_initial_values_do_not_depend_on_the_depth_and_outputs_are_scaled_by_it() -> None:
    def state(num_layers: int) -> dict[str, torch.Tensor]:
        shape = ModelShape(
            hidden_size=64,
            num_layers=num_layers,
            num_heads=4,
            ffn_size=256,
            vocab_size=VOCAB,
            sequence_length=8,
            embedding_size=64,
        )
        model = build_model("opt", shape, LayerFactory(seed=1, pattern=None))
        return {tensor.name: tensor.tensor.detach() for tensor in logical_tensors(model)}

    shallow, deep = state(2), state(8)
    for name, tensor in shallow.items():
        ratio = 2.0 if name.endswith(("out_proj.weight.values", "fc2.weight.values")) else 1.0
        torch.testing.assert_close(tensor, deep[name] * ratio)
    assert float(deep["decoder.layers.1.fc1.weight.values"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(deep["decoder.layers.1.fc2.weight.values"].std()) == pytest.approx(0.02 / 16**0.5, rel=0.05)
