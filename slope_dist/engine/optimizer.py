"""AdamW over the model's parameter groups, the same for every engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slope_dist.layers import LogicalTensor
from slope_dist.sparse import SparseWeight


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW's numbers for a run; the learning rate comes with each step.

    Attributes:
        betas: decay rates of the moments.
        epsilon: the term in the denominator.
        weight_decay: of matrices; biases and norms have none.
        adapter_weight_decay: of the adapters.
        gradient_clipping: largest global gradient norm; 0: off.
    """

    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    adapter_weight_decay: float
    gradient_clipping: float


def parameter_groups(tensors: list[LogicalTensor], settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Groups by name: "decay", "no_decay" and, last and on its own, "adapters".

    The adapters' group is last so that the flat partitions of the others keep their size and order when it appears.
    """
    trained = [tensor for tensor in tensors if tensor.trained]
    base = [tensor for tensor in trained if not tensor.adapter]
    groups = [
        ("decay", [t for t in base if t.decay], settings.weight_decay),
        ("no_decay", [t for t in base if not t.decay], 0.0),
        ("adapters", [t for t in trained if t.adapter], settings.adapter_weight_decay),
    ]
    return [
        {"name": name, "params": [t.tensor for t in members], "weight_decay": decay}
        for name, members, decay in groups
        if members
    ]


class AdamW(torch.optim.AdamW):
    """torch's AdamW with zeroed state from the start, so that state can be loaded before the first step."""

    def __init__(self, groups: list[dict[str, Any]], settings: OptimizerSettings) -> None:
        # Learning rate 0 until the schedule sets it: DeepSpeed takes a step while it is built, which must change
        # nothing.
        super().__init__(groups, lr=0.0, betas=settings.betas, eps=settings.epsilon, fused=torch.cuda.is_available())
        self._resident: dict[Tensor, SparseWeight] = {}

    def write_transposes(self, weights: Iterable[SparseWeight]) -> None:
        """From now on update these weights, whole in this optimizer, and their resident transposes in one pass."""
        self._resident = {weight.values: weight for weight in weights}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all parameters."""
        held: dict[Tensor, Tensor] = {}
        for group in self.param_groups if self._resident else ():
            for parameter in group["params"]:
                if parameter in self._resident and parameter.grad is not None:
                    self._step_with_transpose(parameter, group)
                    held[parameter] = parameter.grad
                    parameter.grad = None
        super().step(closure)
        for parameter, gradient in held.items():
            parameter.grad = gradient

    def _step_with_transpose(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        state["step"] += 1
        self._resident[parameter].adamw_step(
            state["exp_avg"],
            state["exp_avg_sq"],
            step=state["step"],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def reset_state(self, parameters: dict[str, list[Tensor]]) -> None:
        """Zero moments and step counters of each group's (possibly flattened) parameters."""
        for members in parameters.values():
            for parameter in members:
                on = parameter.device if self.defaults["fused"] else torch.device("cpu")
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=on),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


class GuardedAdamW(AdamW):
    """AdamW that measures, checks and clips gradients itself, for engines that do not.

    Args:
        groups: of `parameter_groups`.
        settings: its numbers, with the norm to which gradients are scaled down.
        counted: parameters whose gradients count on this rank, by id: of several copies, one rank's.
        norm_group: ranks that hold other parts of the gradient; None where this one holds all of it.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        settings: OptimizerSettings,
        *,
        counted: set[int],
        norm_group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__(groups, settings)
        self.max_norm = settings.gradient_clipping
        self.counted = counted
        self.norm_group = norm_group
        self.overflow = False
        # The name DeepSpeed reads.
        self._global_grad_norm = 0.0

    @property
    def grad_norm(self) -> float:
        """Global L2 norm of the last step's gradient, before clipping."""
        return self._global_grad_norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update if the global gradient norm is finite; `overflow` says whether it was not."""
        norm = self.global_norm()
        self._global_grad_norm = float(norm)
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            return
        if self.max_norm > 0:
            nn.utils.clip_grads_with_norm_(
                [p for group in self.param_groups for p in group["params"]], self.max_norm, norm
            )
        super().step(closure)

    def global_norm(self) -> Tensor:
        """L2 norm of the whole gradient, the same on every rank: fp32 scalar."""
        gradients = [
            p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None and id(p) in self.counted
        ]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        if self.norm_group is None:
            return norm
        device = self.param_groups[0]["params"][0].device
        square = norm.to(device, torch.float64).square()
        dist.all_reduce(square, group=self.norm_group)
        return square.sqrt().float()


def mean_over_ranks(value: Tensor, group: dist.ProcessGroup) -> float:
    """Mean of a scalar over the ranks of a group."""
    value = value.detach().to(torch.float64)
    dist.all_reduce(value, group=group)
    return float(value) / dist.get_world_size(group)
