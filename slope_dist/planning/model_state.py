"""Parameters and bytes of one rank's share of a model: weights, metadata, gradients, optimizer.

Activations and communication buffers are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from slope_dist.layers import logical_tensors
from slope_dist.parallel.fragments import rectangle_size
from slope_dist.sparse import SparseWeight


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Elements, each counted on the one rank that owns it, so that the shares of all ranks add up to the model.

    Attributes:
        total: what the matrices and vectors stand for, pruned elements included.
        kept: trained elements of the pruned weights.
        dense: trained elements of everything else, adapters included.
        adapters: those of `dense` that belong to adapters.
        metadata: bytes of packed indices and held column masks.
    """

    total: int = 0
    kept: int = 0
    dense: int = 0
    adapters: int = 0
    metadata: int = 0

    def __add__(self, other: ParameterCount) -> ParameterCount:
        """The counts of two shares together."""
        return ParameterCount(
            total=self.total + other.total,
            kept=self.kept + other.kept,
            dense=self.dense + other.dense,
            adapters=self.adapters + other.adapters,
            metadata=self.metadata + other.metadata,
        )


@dataclass(frozen=True, kw_only=True)
class ShareSize:
    """What one rank holds before its data ranks divide anything: copies and the vocabulary's padding included.

    Attributes:
        elements: what the matrices and vectors stand for, pruned elements included.
        trained: trained elements.
        metadata: bytes of packed indices and held column masks.
        kept: trained elements of the pruned weights, which is also how many their transposes have.
        indices: bytes of packed indices, which is also what their transposes' take.
        largest: trained elements of the largest tensor.
        groups: trained elements of the optimizer's groups: matrices, vectors, adapters.
    """

    elements: int
    trained: int
    metadata: int
    kept: int
    indices: int
    largest: int
    groups: tuple[int, int, int]

    def __add__(self, other: ShareSize) -> ShareSize:
        """What both are together, where they have no tensor in common."""
        first, second, third = (one + two for one, two in zip(self.groups, other.groups, strict=True))
        return ShareSize(
            elements=self.elements + other.elements,
            trained=self.trained + other.trained,
            metadata=self.metadata + other.metadata,
            kept=self.kept + other.kept,
            indices=self.indices + other.indices,
            largest=max(self.largest, other.largest),
            groups=(first, second, third),
        )


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How an engine stores a share.

    Attributes:
        weight_bytes: bytes of a parameter between steps.
        gradient_bytes: bytes of an accumulated gradient.
        master_bytes: bytes of an fp32 copy beside the parameter; 0 where the parameter is itself the fp32 truth.
        zero_stage: what is split over data ranks: 1 optimizer state, 2 and gradients, 3 and parameters and metadata.
        saved_bytes: bytes of a trained element in a checkpoint, with its moments.
        resident_transpose: whether every 2:4 weight keeps its transpose.
        kernel_metadata: whether every 2:4 weight, and its resident transpose, keeps a vendor's order of its metadata.
    """

    weight_bytes: int
    gradient_bytes: int
    master_bytes: int
    saved_bytes: int
    zero_stage: int
    resident_transpose: bool
    kernel_metadata: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelState:
    """Bytes of one rank.

    Attributes:
        weights: parameters in the dtype they are stored in.
        metadata: packed indices and held column masks.
        transposes: resident (W^{R,C})^T.
        kernel_metadata: what GPU libraries keep of the pruned weights' metadata, in orders of their own.
        gradients: accumulated gradients.
        masters: fp32 copies of the parameters.
        moments: Adam's two moments.
        saved: what the rank writes to a checkpoint, at most.
    """

    weights: int
    metadata: int
    transposes: int
    kernel_metadata: int
    gradients: int
    masters: int
    moments: int
    saved: int

    @classmethod
    def of(cls, share: ShareSize, storage: Storage, data_ranks: int) -> ModelState:
        """The state of one of `data_ranks` ranks that divide a share."""

        def split(size: int, from_stage: int) -> int:
            return -(-size // data_ranks) if storage.zero_stage >= from_stage else size

        return cls(
            weights=split(share.trained * storage.weight_bytes, 3),
            metadata=split(share.metadata, 3),
            transposes=share.kept * storage.weight_bytes + share.indices if storage.resident_transpose else 0,
            kernel_metadata=share.indices * (1 + storage.resident_transpose) if storage.kernel_metadata else 0,
            gradients=split(share.trained * storage.gradient_bytes, 2),
            masters=split(share.trained * storage.master_bytes, 1),
            moments=split(share.trained * 8, 1),
            # What data ranks hold in common they divide for writing.
            saved=split(share.trained * storage.saved_bytes + share.metadata, 0),
        )

    @property
    def optimizer(self) -> int:
        """Masters and moments."""
        return self.masters + self.moments

    @property
    def bytes(self) -> int:
        """All of a rank's bytes that stay while it trains."""
        weights = self.weights + self.metadata + self.transposes + self.kernel_metadata
        return weights + self.gradients + self.optimizer

    @property
    def carried(self) -> int:
        """What waits in memory at the adapter switch while the new engine is built: the fp32 truth, moments, metadata.

        Where there are no masters the weights are the truth.
        """
        return self.optimizer + self.metadata + (0 if self.masters else self.weights)


def count_parameters(share: nn.Module) -> ParameterCount:
    """Count what a rank owns of its share, which may be on the meta device."""
    # How many elements each trained element of a pruned weight stands for.
    expansion = {
        id(weight.values): weight.shape[1] // weight.values.shape[1]
        for weight in share.modules()
        if isinstance(weight, SparseWeight)
    }
    total = kept = dense = adapters = metadata = 0
    for tensor in logical_tensors(share):
        if not tensor.owned:
            continue
        size = rectangle_size(tensor.rectangle)
        if not tensor.trained:
            metadata += size
            continue
        total += size * expansion.get(id(tensor.tensor), 1)
        if id(tensor.tensor) in expansion:
            kept += size
        else:
            dense += size
        adapters += size if tensor.adapter else 0
    return ParameterCount(total=total, kept=kept, dense=dense, adapters=adapters, metadata=metadata)


def measure(share: nn.Module) -> ShareSize:
    """Measure what a rank holds of its share, which may be on the meta device."""
    pruned = [module for module in share.modules() if isinstance(module, SparseWeight)]
    tensors = list(logical_tensors(share))
    sizes = [(t.tensor.numel(), 2 if t.adapter else 0 if t.decay else 1) for t in tensors if t.trained]
    trained = sum(size for size, _ in sizes)
    matrices, vectors, adapters = (sum(size for size, group in sizes if group == number) for number in range(3))
    kept = sum(weight.values.numel() for weight in pruned)
    return ShareSize(
        elements=trained - kept + sum(weight.shape[0] * weight.shape[1] for weight in pruned),
        trained=trained,
        metadata=sum(tensor.tensor.numel() for tensor in tensors if not tensor.trained),
        kept=kept,
        indices=sum(weight.indices.numel() for weight in pruned),
        largest=max(size for size, _ in sizes),
        groups=(matrices, vectors, adapters),
    )
