"""The engine's interface: all that the training loop knows of DeepSpeed or FSDP.

The engine guarantees, whatever its layout, that the gradient norm is global, and that an update happens only if it is
finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from slope_dist.parallel.fragments import Fragment, StateSource
from slope_dist.transfer import Transfer

MicroBatch = tuple[Tensor, Tensor]
"""(tokens, labels), int64 [B, S] each."""

Skip = Literal["loss scale", "non-finite"]
"""Why a step changed nothing.

Fp16's scaler found its scale too high, or gradients were not finite on their own account.
"""


def moved(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """A micro-batch on a device. A GPU's is queued: a copy of pageable memory would wait for all that came before."""
    tokens, labels = batch
    if device.type == "cuda":
        tokens, labels = tokens.pin_memory(), labels.pin_memory()
    return tokens.to(device, non_blocking=True), labels.to(device, non_blocking=True)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step.

    Attributes:
        loss: mean over all ranks and micro-batches, nats per token.
        grad_norm: global L2 norm before clipping; inf or NaN where the step was skipped.
        skipped: why nothing was changed, or None.
    """

    loss: float
    grad_norm: float
    skipped: Skip | None


class Engine(Protocol):
    """A model under training."""

    def begin_step(self, step: int) -> None:
        """What is due before optimizer step `step` (from 1): the column masks of R2's exception."""

    def set_learning_rates(self, rates: Mapping[str, float]) -> None:
        """Learning rate by kind of parameter: "base" and, where there are any, "adapters"."""

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one update if the gradients are finite."""

    def evaluate(self, batch: MicroBatch) -> Tensor:
        """Mean loss of this rank's batch, without gradients: a scalar."""

    def export_state(self) -> tuple[Iterable[Fragment], dict[str, Any]]:
        """This rank's fragments of the logical state, live, and what is not a tensor."""

    def held(self) -> Iterable[Fragment]:
        """All of the state that this rank holds, live and in its largest pieces, each key once.

        Unlike `export_state` it has whole what is whole on every rank, and nothing that is made for its reader. Pieces
        of the same name, kind, rectangle and range on several ranks are equal in every bit.
        """

    def load_state(self, source: StateSource, *, new_adapters: bool = False, transfer: Transfer | None = None) -> None:
        """Take over a state, of any layout.

        Args:
            source: where it is.
            new_adapters: the adapters keep their initial values.
            transfer: told of the bytes that are read.

        Raises:
            UserError: if the source lacks a tensor of this model, or holds what can be no state of it.
        """

    def close(self) -> None:
        """Release the memory. The engine is not used again."""
