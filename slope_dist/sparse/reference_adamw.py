"""AdamW over a compressed 2:4 weight in plain torch: the definition, the CPU path and the oracle (rule R5)."""

from __future__ import annotations

import torch
from torch import Tensor

from slope_dist.sparse import codec, pruning
from slope_dist.sparse.pattern import Pattern


@torch.no_grad()
def adamw_step_reference(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    indices: Tensor,
    values: Tensor,
    transposed: tuple[Tensor, Tensor] | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: Tensor | float,
    grad_scale: Tensor | float = 1.0,
    column_mask: Tensor | None = None,
) -> None:
    """Update a compressed weight, and what is made of it, in place.

    The numbers are those of `torch.optim.AdamW` (arXiv 1711.05101, algorithm 2), operation for operation.

    Args:
        master: fp32 [O, K], the weight that is trained.
        exp_avg: fp32 [O, K], the first moment.
        exp_avg_sq: fp32 [O, K], the second moment.
        grad: [O, K] of any float dtype.
        indices: uint8 [O, I / 8], the metadata of all [O, K].
        values: [O, K], the live copy of the weight, written in its own dtype; may be `master` itself.
        transposed: values [I, O / 2] of the dtype of `values` and indices uint8 [I, O / 8], written with (W^{R,C})^T
            of the live copy; or None.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: the term in the denominator.
        weight_decay: decoupled decay of the weight.
        step: number of this update, from 1 up; a scalar of any device or a number.
        grad_scale: the gradient is multiplied by it first; a scalar of any device or a number.
        column_mask: packed uint8 [O, I / 8], replaces the mask of `transposed` by magnitude where one is held.
    """
    grad = grad.float() * grad_scale
    step = step.double() if isinstance(step, Tensor) else step
    master.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    denominator = (exp_avg_sq.sqrt() / (1 - betas[1] ** step) ** 0.5).add_(eps)
    master.sub_(exp_avg * (lr / (1 - betas[0] ** step)) / denominator)
    if values is not master:
        values.copy_(master)
    if transposed is not None:
        kept = None if column_mask is None else codec.unpack_bits(column_mask)
        made = pruning.doubly_pruned_transpose(values, indices, Pattern(2, 4), kept)
        for held, new in zip(transposed, made, strict=True):
            held.copy_(new)
