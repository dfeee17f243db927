"""Small sparse models of every form of tests/models/twins.py at rest in memory, every tensor random, none in files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from slope_dist.config.model import ModelConfig
from slope_dist.data.tokenizer import Tokenizer
from slope_dist.errors import UserError
from slope_dist.export.stored import LinearForm, Origin, StoredModel
from slope_dist.layers import LayerFactory, Linear, logical_tensors
from slope_dist.models import LanguageModel, ModelShape, build_model, family
from slope_dist.planning.shapes import shape_of
from slope_dist.sparse import Pattern, SparseWeight
from tests.models.twins import FORMS

RANK = 4
"""Of adapters: none that vLLM accepts."""


class MemoryModel(StoredModel):
    """A model of the trainer at rest.

    Attributes:
        module: the model itself.
    """

    def __init__(self, module: LanguageModel, model: ModelConfig, dtype: torch.dtype, tokenizer: Tokenizer | None):
        self.module = module
        self.model = model
        self.dtype = dtype
        self.origin = Origin(Path("memory"), "checkpoint", 12)
        self.linears = {
            layer.name: LinearForm(
                layer.weight.shape,
                layer.weight.pattern if isinstance(layer.weight, SparseWeight) else None,
                0 if layer.adapter is None else layer.adapter.down.shape[0],
                bias=layer.bias is not None,
            )
            for layer in module.modules()
            if isinstance(layer, Linear)
        }
        self._tensors = {tensor.name: tensor.tensor.detach() for tensor in logical_tensors(module)}
        self._tokenizer = tokenizer

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """See `StoredModel`."""
        return self._tensors[name][start:stop].clone()

    def tokenizer(self) -> Tokenizer:
        """The one it was given."""
        if self._tokenizer is None:
            raise UserError("the tokenizer of memory is not there; name it with --tokenizer PATH")
        return self._tokenizer


def random_stored(
    form_name: str,
    *,
    adapters: bool = False,
    dtype: torch.dtype = torch.float32,
    pattern: str | None = "2:4",
    rank: int = RANK,
    vocab_size: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> MemoryModel:
    """A model of a form of `FORMS` as the trainer makes it: sparse but for its first linears.

    Every tensor is random and wide enough to show in the logits; adapters' second factors too. The first two rows of
    each sparse weight begin with a kept 0.0 and a kept -0.0. The same arguments give the same model.

    Args:
        form_name: of `FORMS`.
        adapters: of `rank` on each sparse linear.
        dtype: of all numbers, which are drawn in fp32.
        pattern: N:M of the sparse linears; None: all are dense.
        vocab_size: another than the form's, such as that of `tokenizer`.
    """
    form = FORMS[form_name]
    model = config_of(form.family, form.shape, vocab_size)
    factory = LayerFactory(
        seed=5,
        pattern=None if pattern is None else Pattern.parse(pattern),
        dense_layers=family(form.family).dense_layers,
        adapter_rank=rank if adapters else 0,
    )
    module = build_model(form.family, shape_of(model), factory)
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for tensor in logical_tensors(module):
            if not tensor.trained:
                continue
            is_norm = "norm" in tensor.name or ".ln_" in tensor.name
            tensor.tensor.normal_(1.0 if is_norm and tensor.name.endswith(".weight") else 0.0, 0.2, generator=draw)
            if tensor.name.endswith(".adapter.down"):
                tensor.tensor.mul_(5)
        for layer in module.modules():
            if isinstance(layer, SparseWeight):
                layer.values[:2, 0] = torch.tensor([0.0, -0.0])
    return MemoryModel(module.to(dtype).eval(), model, dtype, tokenizer)


def config_of(family_name: str, shape: ModelShape, vocab_size: int | None = None) -> ModelConfig:
    """The section of a config that gives this shape, for which `shape_of` undoes it."""
    keys = {
        "family": family_name,
        "hidden_size": shape.hidden_size,
        "num_layers": shape.num_layers,
        "num_heads": shape.num_heads,
        "ffn_size": shape.ffn_size,
        "vocab_size": vocab_size or shape.vocab_size,
        "sequence_length": shape.sequence_length,
        "norm_epsilon": shape.norm_epsilon,
    }
    if family_name == "opt":
        keys |= {"embedding_size": shape.embedding_size, "norm_position": shape.norm_position}
    if family_name in ("llama", "mistral"):
        keys |= {
            "num_kv_heads": shape.kv_heads,
            "tied_head": shape.tied_head,
            "rotary_base": shape.rotary.base,
            "rotary_scaling": shape.rotary.scaling,
            "rotary_low_factor": shape.rotary.low_factor,
            "rotary_high_factor": shape.rotary.high_factor,
            "rotary_original_length": shape.rotary.original_length,
        }
    return ModelConfig.model_validate(keys)
