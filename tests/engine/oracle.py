"""A run of the small model in plain torch: no engine, no ranks, no checkpoint. What the engine's runs must equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from slope_dist.config import Config, derive, load_config
from slope_dist.data.corpus import Corpus
from slope_dist.data.sampling import BatchReader, Part
from slope_dist.layers import logical_tensors
from slope_dist.sparse import SparseWeight
from slope_dist.training.build import build, layer_factory
from slope_dist.training.schedule import learning_rates


def plain_run(path: str, skipped: list[int]) -> dict[str, Any]:
    """Train as the config says, but leave out the updates of the steps in `skipped`.

    Returns:
        losses and global gradient norms by step, and the final values of all logical tensors.
    """
    config = load_config(path)
    derived = derive(config, 1)
    model = _model(config, adapters=False)
    optimizer = _optimizer(config, model)
    reader = BatchReader(
        [Part(Corpus.open(config.data.corpora[0].folder, "train", config.model.vocab_size))],
        sequence_length=config.model.sequence_length,
        global_batch_size=config.training.global_batch_size,
        seed=config.run.seed,
    )
    losses, norms = [], []
    for step in range(1, config.training.steps + 1):
        if step == derived.first_adapter_step:
            model, optimizer = _with_adapters(config, model, optimizer)
        rates = learning_rates(config, step, derived.first_adapter_step)
        for group in optimizer.param_groups:
            group["lr"] = rates[group["kind"]]
        batch = reader.batch(step, range(config.training.global_batch_size))
        optimizer.zero_grad()
        loss = model(batch.tokens, batch.labels)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.training.gradient_clipping)
        if step not in skipped:
            optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    weights = {tensor.name: tensor.tensor.detach() for tensor in logical_tensors(model)}
    return {"losses": losses, "norms": norms, "weights": weights}


def _model(config: Config, *, adapters: bool) -> nn.Module:
    model = build(config, layer_factory(config, derive(config, 1), adapters=adapters))
    for module in model.modules():
        if isinstance(module, SparseWeight):
            module.resident_transpose = False
    return model


def _optimizer(config: Config, model: nn.Module) -> torch.optim.AdamW:
    training = config.training
    groups = [
        {
            "params": [tensor.tensor],
            "weight_decay": training.weight_decay if tensor.decay else 0.0,
            "kind": "adapters" if tensor.adapter else "base",
        }
        for tensor in logical_tensors(model)
        if tensor.trained
    ]
    return torch.optim.AdamW(groups, betas=(training.beta1, training.beta2), eps=training.epsilon)


def _with_adapters(config: Config, old: nn.Module, optimizer: torch.optim.AdamW) -> tuple[nn.Module, torch.optim.AdamW]:
    model = _model(config, adapters=True)
    values = {tensor.name: tensor.tensor for tensor in logical_tensors(old)}
    after = _optimizer(config, model)
    for tensor in logical_tensors(model):
        if tensor.name in values:
            tensor.tensor.data.copy_(values[tensor.name].data)
            if tensor.trained:
                after.state[tensor.tensor] = optimizer.state[values[tensor.name]]
    return model, after
