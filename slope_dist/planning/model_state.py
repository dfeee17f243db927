"""Bytes of model state on one rank: weights, metadata, gradients, optimizer. Activations and buffers are not in it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from slope_dist.layers import logical_tensors
from slope_dist.sparse import SparseWeight


@dataclass(frozen=True, kw_only=True)
class ModelState:
    """Parameters of the model, and bytes of one rank.

    Attributes:
        total: elements the model's matrices and vectors stand for, pruned ones included.
        kept: trained elements of the pruned weights.
        dense: trained elements of everything else, adapters included.
        weights: bytes of the parameters in the model's dtype.
        metadata: bytes of packed indices and held column masks.
        transposes: bytes of resident (W^{R,C})^T.
        gradients: bytes of gradients.
        optimizer: bytes of fp32 masters and Adam's moments.
    """

    total: int
    kept: int
    dense: int
    weights: int
    metadata: int
    transposes: int
    gradients: int
    optimizer: int

    @property
    def bytes(self) -> int:
        """All of a rank's bytes."""
        return self.weights + self.metadata + self.transposes + self.gradients + self.optimizer


def model_state(
    model: nn.Module,
    *,
    weight_bytes: int,
    gradient_bytes: int,
    zero_stage: int,
    data_ranks: int,
    resident_transpose: bool,
) -> ModelState:
    """Count a model, which may be on the meta device.

    Args:
        model: the model of the phase in question.
        weight_bytes: bytes of a parameter in the model's dtype.
        gradient_bytes: bytes of an accumulated gradient.
        zero_stage: what is split over data ranks: 1 optimizer state, 2 and gradients, 3 and parameters and metadata.
        data_ranks: how many they are.
        resident_transpose: whether every 2:4 weight keeps its transpose.
    """
    pruned = [module for module in model.modules() if isinstance(module, SparseWeight)]
    kept = sum(weight.values.numel() for weight in pruned)
    metadata = sum(tensor.tensor.numel() for tensor in logical_tensors(model) if not tensor.trained)
    trained = sum(tensor.tensor.numel() for tensor in logical_tensors(model) if tensor.trained)
    expanded = sum(weight.shape[0] * weight.shape[1] for weight in pruned)
    # fp32 models keep a master apart from the parameters too, unless nothing is partitioned.
    master_bytes = 0 if zero_stage == 0 else 4

    def split(size: int, from_stage: int) -> int:
        return -(-size // data_ranks) if zero_stage >= from_stage else size

    return ModelState(
        total=trained - kept + expanded,
        kept=kept,
        dense=trained - kept,
        weights=split(trained * weight_bytes, 3),
        metadata=split(metadata, 3),
        transposes=kept * weight_bytes + sum(weight.indices.numel() for weight in pruned) if resident_transpose else 0,
        gradients=split(trained * gradient_bytes, 2),
        optimizer=split(trained * (master_bytes + 8), 1),
    )
