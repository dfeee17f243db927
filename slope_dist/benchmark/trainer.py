"""A plain trainer, the same for dense and 2:4: 16-bit weights and gradients, fp32 masters and AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from slope_dist.benchmark import memory
from slope_dist.benchmark.random_models import sparse_weights, tensor_bytes
from slope_dist.benchmark.timing import wait
from slope_dist.engine.compilation import BlockCompiler

Backward = Callable[[nn.Module], None]
Blocks = Callable[[nn.Module], Sequence[nn.Module]]


def forget_graphs() -> None:
    """Drop what torch has compiled; called once for all trainers that are compared, which share what is alike.

    The graphs of others would count against a limit of theirs, where torch has one for all.
    """
    torch._dynamo.reset()


def _itself(module: nn.Module) -> Sequence[nn.Module]:
    return [module]


class Trainer:
    """Steps of one module: forward, backward, AdamW on fp32 masters, weights cast down, transposes made anew.

    On a GPU the blocks are graphs of torch.compile, one by one, so that they share what is alike. Where that fails the
    module runs as it is, and `why_eager` has the reason.

    A resident transpose is therefore rebuilt in every step, as it is where each step has one micro-batch.

    Args:
        build: makes the module on its device.
        backward: runs the module forward and backward; leaves nothing but the parameters' gradients.
        device: where.
        blocks: those of the module; it is one itself where none are given.
    """

    def __init__(
        self, build: Callable[[], nn.Module], backward: Backward, device: torch.device, *, blocks: Blocks = _itself
    ) -> None:
        memory.make_workspaces(device)
        self._held_before = memory.allocated(device)
        self.module = module = build()
        self.device = device
        self.why_eager: str | None = None if device.type == "cuda" else "on the CPU"
        self._backward = backward
        self._weights = sparse_weights(module)
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._masters = [nn.Parameter(p.detach().float().clone()) for p in self._parameters]
        self._optimizer = torch.optim.AdamW(
            self._masters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=self.device.type == "cuda"
        )
        # What a dispatcher has to measure, it measures now; its choices decide what a weight is laid out for.
        self.step()
        for weight in self._weights:
            weight.prepare_kernels()
        if device.type == "cuda":
            self._compile(blocks(module))

    def step(self) -> None:
        """One training step."""
        self._backward(self.module)
        self._update()
        # Behind the optimizer in the device's queue: at the beginning of a step it would wait for the host.
        self._transpose()

    def _transpose(self) -> None:
        # Outside of compiled blocks: what is made inside one has no vendor's metadata.
        for weight in self._weights:
            if weight.resident_transpose:
                weight.transpose()

    def _update(self) -> None:
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
            parameter.grad = None
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(list[Tensor](self._parameters), list[Tensor](self._masters))
        for weight in self._weights:
            weight.values_changed()

    def state_bytes(self) -> int:
        """Weights, metadata (a vendor's too), resident transposes, gradients, masters and moments.

        Measured on a GPU, but for the gradients, which go with each step; counted on the CPU.
        """
        gradients = sum(p.nbytes for p in self._parameters)
        self._transpose()
        held = memory.allocated(self.device)
        if held is None or self._held_before is None:
            return tensor_bytes(self.module) + gradients + 3 * sum(p.nbytes for p in self._masters)
        return held - self._held_before + gradients

    def peak_bytes(self) -> int | None:
        """Measured peak of a step, all that the process holds on the GPU included; None on the CPU."""
        if self.device.type != "cuda":
            return None
        self.step()
        wait(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.step()
        wait(self.device)
        return torch.cuda.max_memory_allocated(self.device)

    def _compile(self, blocks: Sequence[nn.Module]) -> None:
        compiler = BlockCompiler()
        for block in blocks:
            compiler(block)
        try:
            self.step()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Of several libraries' own kinds; the step itself has already worked.
            self.why_eager = f"torch.compile: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            for block in blocks:
                del block.forward
            for parameter in (*self._masters, *self._parameters):
                parameter.grad = None
