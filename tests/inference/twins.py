"""transformers' models with the weights of stored ones, adapters added in."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from slope_dist.export.stored import StoredModel
from slope_dist.layers import LayerFactory, logical_tensors
from slope_dist.models import build_model
from tests.models.twins import FORMS, twin_of


def merged_twin(stored: StoredModel, form_name: str) -> nn.Module:
    """transformers' model of a form of `FORMS`, dense, fp32, in evaluation mode."""
    form = FORMS[form_name]
    form = replace(form, shape=replace(form.shape, vocab_size=stored.model.vocab_size))
    dense = build_model(form.family, form.shape, LayerFactory(seed=1, pattern=None))
    with torch.no_grad():
        for tensor in logical_tensors(dense):
            layer = tensor.name.removesuffix(".weight.values")
            tensor.tensor.copy_(stored.merged(layer) if layer in stored.linears else stored.read(tensor.name))
    return twin_of(dense, form)
