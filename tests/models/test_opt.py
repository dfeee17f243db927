"""What is OPT's own: the 350M form, position rows from two, what stays dense, and the depth's effect on initial values.

That its logits are transformers' is in test_parity.py.

Run: pytest tests/models/test_opt.py
"""

from __future__ import annotations

import pytest
import torch

from slope_dist.layers import LayerFactory, logical_tensors
from slope_dist.models import ModelShape, build_model, family
from slope_dist.sparse import Pattern
from tests.models.twins import FORMS, LENGTH, VOCAB, random_model

PRE_NORM, FORM_OF_350M = FORMS["opt"], FORMS["opt 350M"]


def test_the_350m_form_has_projections_and_no_final_norm() -> None:
    names = {tensor.name for tensor in logical_tensors(random_model(FORM_OF_350M))}
    assert {"decoder.project_in.weight.values", "decoder.project_out.weight.values"} <= names
    assert "decoder.project_in.bias" not in names and "decoder.project_out.bias" not in names
    assert "decoder.final_layer_norm.weight" not in names
    assert "decoder.final_layer_norm.weight" in {tensor.name for tensor in logical_tensors(random_model(PRE_NORM))}


def test_position_rows_begin_at_two() -> None:
    model = random_model(PRE_NORM)
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
    build_model("opt", FORM_OF_350M.shape, make)
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
