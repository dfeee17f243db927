"""Small models of every family with every tensor random, and transformers' models with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from slope_dist.layers import LayerFactory, logical_tensors
from slope_dist.models import LanguageModel, ModelShape, Rotary, build_model

VOCAB, LENGTH = 97, 80

_SHAPE = ModelShape(
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    ffn_size=160,
    vocab_size=VOCAB,
    sequence_length=LENGTH,
    embedding_size=64,
)
_GROUPED = replace(_SHAPE, num_kv_heads=2, tied_head=False)


@dataclass(frozen=True)
class Form:
    """A family in one of its forms; `twin` makes transformers' model of a shape."""

    family: str
    shape: ModelShape
    twin: Callable[[ModelShape], nn.Module]


def _opt(shape: ModelShape) -> nn.Module:
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
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
    )


def _gpt2(shape: ModelShape) -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=shape.vocab_size,
            n_embd=shape.hidden_size,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
            n_inner=shape.ffn_size,
            n_positions=shape.sequence_length,
            layer_norm_epsilon=shape.norm_epsilon,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def _of_llama(shape: ModelShape) -> dict[str, Any]:
    rotary = shape.rotary
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": rotary.base}
    if rotary.scaling is not None:
        parameters |= {
            "rope_type": "llama3",
            "factor": rotary.scaling,
            "low_freq_factor": rotary.low_factor,
            "high_freq_factor": rotary.high_factor,
            "original_max_position_embeddings": rotary.original_length,
        }
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.ffn_size,
        "max_position_embeddings": shape.sequence_length,
        "rms_norm_eps": shape.norm_epsilon,
        "tie_word_embeddings": shape.tied_head,
        "rope_parameters": parameters,
    }


def _llama(shape: ModelShape) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_of_llama(shape)))


def _mistral(shape: ModelShape) -> nn.Module:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**_of_llama(shape), sliding_window=None))


FORMS = {
    "opt": Form("opt", _SHAPE, _opt),
    "opt 350M": Form("opt", replace(_SHAPE, ffn_size=256, embedding_size=32, norm_position="post"), _opt),
    "gpt2": Form("gpt2", replace(_SHAPE, norm_epsilon=1e-3), _gpt2),
    "llama": Form("llama", replace(_GROUPED, norm_epsilon=1e-3, rotary=Rotary(base=500_000.0)), _llama),
    # Of 8 pairs of features some keep their frequency, some are slowed and some are between.
    "llama scaled": Form(
        "llama", replace(_GROUPED, rotary=Rotary(base=100.0, scaling=8.0, original_length=64), num_kv_heads=1), _llama
    ),
    "llama tied": Form("llama", replace(_SHAPE, num_kv_heads=4), _llama),
    "mistral": Form("mistral", replace(_GROUPED, rotary=Rotary(base=1e6)), _mistral),
}


def random_model(form: Form) -> LanguageModel:
    """Dense, with every tensor random: norms about one, the others wide enough that each shows in the logits."""
    model = build_model(form.family, form.shape, LayerFactory(seed=1, pattern=None))
    with torch.no_grad():
        for tensor in logical_tensors(model):
            is_norm = "norm" in tensor.name or ".ln_" in tensor.name
            tensor.tensor.normal_(1.0 if is_norm and tensor.name.endswith(".weight") else 0.0, 0.2)
    return model


def twin_of(model: LanguageModel, form: Form) -> nn.Module:
    """transformers' model of the same form with the same weights: all of them, and no others."""
    twin = form.twin(form.shape)
    state = {
        tensor.name.replace(".weight.values", ".weight"): tensor.tensor.detach().clone()
        for tensor in logical_tensors(model)
    }
    if form.family == "opt":
        state = {f"model.{name}": tensor for name, tensor in state.items()}
    if form.family == "gpt2":
        state = _joined(state)
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected
    # A tied head is the embedding; transformers counts it as missing and keeps the tie.
    assert set(missing) <= ({"lm_head.weight"} if form.shape.tied_head else set())
    assert (twin.lm_head.weight is twin.get_input_embeddings().weight) == form.shape.tied_head
    return twin.eval()


def _joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's own tensors: query, key and value in one, and every linear's weight [I, O]."""
    joined = {}
    for name, tensor in state.items():
        if ".q_proj." in name:
            parts = [state[name.replace(".q_proj.", f".{kind}_proj.")] for kind in "qkv"]
            name, tensor = name.replace(".q_proj.", ".c_attn."), torch.cat(parts)
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        is_linear = any(part in name for part in (".c_attn.", ".c_proj.", ".c_fc."))
        joined[name] = tensor.T.contiguous() if is_linear and tensor.dim() == 2 else tensor
    return joined
