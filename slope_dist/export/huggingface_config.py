"""config.json of Hugging Face's transformers, from the section of our model and back.

What is read may come from anyone: what our model would compute otherwise is refused, and so is what says nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from slope_dist.config.model import ModelConfig
from slope_dist.errors import UserError

ARCHITECTURES = {
    "opt": "OPTForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}

_OPT_EPSILON = 1e-5
"""Of transformers' OPT, which has no key for it."""

_MISTRAL_WINDOW, _MISTRAL_GROUPS = 4096, 8
"""What transformers takes where a Mistral's config has no sliding_window, and no num_key_value_heads."""


def config_json(model: ModelConfig, dtype: torch.dtype, ids: Mapping[str, int | None]) -> dict[str, object]:
    """The content of config.json.

    Args:
        model: to describe.
        dtype: of the weights.
        ids: of special tokens, by transformers' names.

    Raises:
        UserError: if transformers cannot compute the model.
    """
    family: dict[str, object]
    if model.family == "opt":
        family = _opt_json(model)
    elif model.family == "gpt2":
        family = _gpt2_json(model)
    else:
        family = _llama_json(model)
    return {
        "architectures": [ARCHITECTURES[model.family]],
        "model_type": model.family,
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.has_tied_head,
        **family,
        **ids,
    }


def _opt_json(model: ModelConfig) -> dict[str, object]:
    if model.norm_epsilon != _OPT_EPSILON:
        raise UserError(
            f"model.norm_epsilon {model.norm_epsilon} cannot be had in Hugging Face's OPT, which has {_OPT_EPSILON}; "
            "convert to another form"
        )
    return {
        "activation_function": "relu",
        "attention_dropout": 0.0,
        "do_layer_norm_before": model.norm_position == "pre",
        "dropout": 0.0,
        "enable_bias": True,
        "ffn_dim": model.ffn_size,
        "hidden_size": model.hidden_size,
        "init_std": model.init_std,
        "layer_norm_elementwise_affine": True,
        "max_position_embeddings": model.sequence_length,
        "num_attention_heads": model.num_heads,
        "num_hidden_layers": model.num_layers,
        "word_embed_proj_dim": model.token_embedding_size,
    }


def _gpt2_json(model: ModelConfig) -> dict[str, object]:
    return {
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "initializer_range": model.init_std,
        "layer_norm_epsilon": model.norm_epsilon,
        "n_embd": model.hidden_size,
        "n_head": model.num_heads,
        "n_inner": model.ffn_size,
        "n_layer": model.num_layers,
        "n_positions": model.sequence_length,
        "resid_pdrop": 0.0,
    }


def _llama_json(model: ModelConfig) -> dict[str, object]:
    scaling: dict[str, object] = {"rope_type": "default"}
    if model.rotary_scaling is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": model.rotary_scaling,
            "low_freq_factor": model.rotary_low_factor,
            "high_freq_factor": model.rotary_high_factor,
            "original_max_position_embeddings": model.rotary_original_length,
        }
    # transformers 5 reads rope_parameters; what came before reads the other two, and takes defaults without them.
    family: dict[str, object] = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": model.hidden_size // model.num_heads,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_std,
        "intermediate_size": model.ffn_size,
        "max_position_embeddings": model.sequence_length,
        "num_attention_heads": model.num_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_kv_heads or model.num_heads,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": {"rope_theta": model.rotary_base, **scaling},
        "rope_scaling": None if model.rotary_scaling is None else scaling,
        "rope_theta": model.rotary_base,
    }
    if model.family == "mistral":
        del family["attention_bias"]
        return {**family, "sliding_window": None}
    return {**family, "mlp_bias": False}


def model_of(content: Mapping[str, object], path: Path) -> ModelConfig:
    """The section of our model that a config.json describes; what is for training only is not looked at.

    Args:
        content: of the file, believed in nothing.
        path: of the file, for messages.

    Raises:
        UserError: naming the key, its value and what would be right.
    """
    keys = Keys(content, path)
    family = keys.one_of("model_type", list(ARCHITECTURES))
    keys.one_of("pruned_heads", [{}, None], {})
    fields: dict[str, object]
    if family == "opt":
        fields = _opt_fields(keys)
    elif family == "gpt2":
        fields = _gpt2_fields(keys)
    else:
        fields = _llama_fields(keys, family)
    try:
        return ModelConfig.model_validate({"family": family, "vocab_size": keys.whole("vocab_size"), **fields})
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        reason = details.get("ctx", {}).get("error") or f"{'.'.join(map(str, details['loc']))}: {details['msg']}"
        raise UserError(f"{path}: our model cannot have these sizes: {reason}") from None


class Keys:
    """The content of a JSON file, asked for one key after another; each refusal names key, value and what is right."""

    def __init__(self, content: Mapping[str, object], path: Path, within: str = "") -> None:
        self._content = content
        self._path = path
        self._within = within

    def refuse(self, key: str, right: str) -> UserError:
        """What to raise about a key."""
        value = self._content.get(key)
        try:
            shown = json.dumps(value)
        except RecursionError:
            # Almost too deep to be read.
            shown = "deeply nested"
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        found = f"is {shown}" if key in self._content else "is missing"
        return UserError(f"{self._path}: {self._within}{key} {found}; {right}")

    def one_of(self, key: str, allowed: list[Any], default: Any = None) -> Any:
        """The value, which must be one of these; `default` where there is none."""
        value = self._content.get(key, default)
        if not any(value == each and type(value) is type(each) for each in allowed):
            right = json.dumps(allowed[0]) if len(allowed) == 1 else f"one of {json.dumps(allowed)[1:-1]}"
            raise self.refuse(key, f"our model has {right}")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number; of null, the default too."""
        value = self._content.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value < 2**31:
            raise self.refuse(key, "expected a whole number above 0")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number; of null, the default too."""
        value = self._content.get(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not 0 < value < 1e30:  # type: ignore[operator]
            raise self.refuse(key, "expected a number above 0")
        return float(value)  # type: ignore[arg-type]

    def strings(self, key: str) -> list[str] | None:
        """A list of strings; None of a string alone."""
        value = self._content.get(key)
        if isinstance(value, str):
            return None
        if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
            raise self.refuse(key, "expected a list of names")
        return value

    def within(self, key: str) -> Keys | None:
        """The keys of an object; None where there is none or null."""
        value = self._content.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.refuse(key, "expected an object")
        return Keys(value, self._path, f"{key}.")

    def given(self, key: str) -> bool:
        """Whether there is such a key, of whatever value."""
        return key in self._content

    @property
    def names(self) -> list[str]:
        """All keys, in the order of the file."""
        return list(self._content)


def _opt_fields(keys: Keys) -> dict[str, object]:
    keys.one_of("activation_function", ["relu"], "relu")
    keys.one_of("enable_bias", [True], True)
    keys.one_of("layer_norm_elementwise_affine", [True], True)
    keys.one_of("tie_word_embeddings", [True], True)
    pre = keys.one_of("do_layer_norm_before", [True, False], True)
    if pre:
        keys.one_of("_remove_final_layer_norm", [False], False)
    hidden = keys.whole("hidden_size")
    embedding = keys.whole("word_embed_proj_dim", hidden)
    return {
        "hidden_size": hidden,
        "num_layers": keys.whole("num_hidden_layers"),
        "num_heads": keys.whole("num_attention_heads"),
        "ffn_size": keys.whole("ffn_dim"),
        "sequence_length": keys.whole("max_position_embeddings"),
        "embedding_size": embedding if embedding != hidden else None,
        "norm_position": "pre" if pre else "post",
        "norm_epsilon": _OPT_EPSILON,
    }


def _gpt2_fields(keys: Keys) -> dict[str, object]:
    # Two names of the same formula.
    keys.one_of("activation_function", ["gelu_new", "gelu_pytorch_tanh"], "gelu_new")
    keys.one_of("scale_attn_weights", [True], True)
    keys.one_of("scale_attn_by_inverse_layer_idx", [False], False)
    keys.one_of("add_cross_attention", [False], False)
    keys.one_of("tie_word_embeddings", [True], True)
    hidden = keys.whole("n_embd")
    return {
        "hidden_size": hidden,
        "num_layers": keys.whole("n_layer"),
        "num_heads": keys.whole("n_head"),
        "ffn_size": keys.whole("n_inner", 4 * hidden),
        "sequence_length": keys.whole("n_positions"),
        "norm_epsilon": keys.number("layer_norm_epsilon", 1e-5),
    }


def _llama_fields(keys: Keys, family: str) -> dict[str, object]:
    keys.one_of("hidden_act", ["silu"], "silu")
    keys.one_of("attention_bias", [False], False)
    keys.one_of("mlp_bias", [False], False)
    hidden, heads = keys.whole("hidden_size"), keys.whole("num_attention_heads")
    length = keys.whole("max_position_embeddings")
    if keys.whole("head_dim", hidden // heads) != hidden // heads:
        raise keys.refuse("head_dim", f"our model has hidden_size / num_attention_heads, which is {hidden // heads}")
    groups = heads
    if family == "mistral":
        groups = heads if keys.given("num_key_value_heads") else _MISTRAL_GROUPS
        window = keys.whole("sliding_window", length if keys.given("sliding_window") else _MISTRAL_WINDOW)
        # One that reaches over all positions hides none.
        if window < length:
            raise keys.refuse("sliding_window", "our model has null: every token sees all before it")
    return {
        "hidden_size": hidden,
        "num_layers": keys.whole("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": keys.whole("num_key_value_heads", groups),
        "ffn_size": keys.whole("intermediate_size"),
        "sequence_length": length,
        "norm_epsilon": keys.number("rms_norm_eps", 1e-6),
        "tied_head": keys.one_of("tie_word_embeddings", [True, False], False),
        **_rotary_fields(keys, length),
    }


def _rotary_fields(keys: Keys, length: int) -> dict[str, object]:
    """Of transformers 5 in one object, of what came before in two keys."""
    base = keys.number("rope_theta", 10_000.0)
    rotary = keys.within("rope_scaling") or keys.within("rope_parameters")
    for each in (keys, rotary):
        if each is not None and each.number("partial_rotary_factor", 1.0) != 1:
            raise each.refuse("partial_rotary_factor", "our model has 1: all features of a head turn")
    if rotary is None:
        return {"rotary_base": base}
    base = rotary.number("rope_theta", base)
    kind = rotary.one_of("rope_type" if rotary.given("rope_type") else "type", ["default", "llama3"], "default")
    if kind == "default":
        return {"rotary_base": base}
    return {
        "rotary_base": base,
        "rotary_scaling": rotary.number("factor"),
        "rotary_low_factor": rotary.number("low_freq_factor"),
        "rotary_high_factor": rotary.number("high_freq_factor"),
        "rotary_original_length": rotary.whole("original_max_position_embeddings", length),
    }
