"""AdamW over the model's parameter groups, the same for every engine."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slope_dist.layers import LogicalTensor


def parameter_groups(
    tensors: list[LogicalTensor], *, weight_decay: float, adapter_weight_decay: float
) -> list[dict[str, Any]]:
    """Groups by name: "decay", "no_decay" and, last and on its own, "adapters".

    The adapters' group is last so that the flat partitions of the others keep their size and order when it appears.
    """
    trained = [tensor for tensor in tensors if tensor.trained]
    base = [tensor for tensor in trained if not tensor.adapter]
    groups = [
        ("decay", [t for t in base if t.decay], weight_decay),
        ("no_decay", [t for t in base if not t.decay], 0.0),
        ("adapters", [t for t in trained if t.adapter], adapter_weight_decay),
    ]
    return [
        {"name": name, "params": [t.tensor for t in members], "weight_decay": decay}
        for name, members, decay in groups
        if members
    ]


class AdamW(torch.optim.AdamW):
    """torch's AdamW with zeroed state from the start, so that state can be loaded before the first step."""

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> None:
        # Learning rate 0 until the schedule sets it: DeepSpeed takes a step while it is built, which must change
        # nothing.
        super().__init__(groups, lr=0.0, betas=betas, eps=eps, fused=torch.cuda.is_available())

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
    """AdamW that measures, checks and clips whole gradients itself, for engines that do not (ZeRO 0 in fp32)."""

    def __init__(
        self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float, max_norm: float
    ) -> None:
        super().__init__(groups, betas=betas, eps=eps)
        self.max_norm = max_norm
        self.overflow = False
        self._global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update if the global gradient norm is finite; `overflow` says whether it was not."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        self._global_grad_norm = float(norm)
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            return
        if self.max_norm > 0:
            nn.utils.clip_grads_with_norm_(
                [p for group in self.param_groups for p in group["params"]], self.max_norm, norm
            )
        super().step(closure)


def mean_over_ranks(value: Tensor) -> float:
    """Mean of a scalar over all ranks."""
    value = value.detach().to(torch.float64)
    dist.all_reduce(value)
    return float(value) / dist.get_world_size()
