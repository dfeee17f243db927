"""Transformer blocks as graphs of torch.compile.

Blocks are compiled one by one, as torchtitan does: what is compiled is small, blocks that are alike share it, and hooks
on a block (of FSDP, of recomputation) stay outside.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from slope_dist.errors import UserError

BACKEND = "inductor"

MOST_GRAPHS = 256
"""Of one engine. A kind of block has one for training and one for evaluation."""


def check_compiler() -> None:
    """Refuse compilation where torch will not find the program that it needs.

    On a CPU it writes C++; on a GPU Triton builds what starts its kernels, in C.

    Raises:
        UserError: naming the program.
    """
    variable, names = ("CC", ("gcc", "clang")) if torch.cuda.is_available() else ("CXX", ("g++",))
    wanted = os.environ.get(variable)
    tried = names if wanted is None else (wanted,)
    if not any(map(shutil.which, tried)):
        raise UserError(
            f"training.compile true needs a compiler on this machine, and there is no {' or '.join(tried)} in PATH; "
            f"install one, name one in {variable}, or use training.compile false"
        )


class BlockCompiler:
    """Makes `forward` of the blocks given to it a graph, at its first use and at each use of another kind.

    The block itself stays what it is: its class, the names of its tensors, and its hooks. A part of it that cannot be
    compiled, or more graphs than `MOST_GRAPHS`, is an error of torch and never an uncompiled run.
    """

    def __init__(self) -> None:
        # Isolated: the graphs of an engine that is closed would count against the next one's.
        limits: dict[str, Any] = {"recompile_limit": MOST_GRAPHS, "isolate_recompiles": True}
        # torch before 2.13 has neither.
        known = {name: limit for name, limit in limits.items() if name in signature(torch.compile).parameters}
        compiled = torch.compile(_forward, fullgraph=True, dynamic=False, backend=BACKEND, **known)
        self._forward: Callable[..., Tensor] = compiled if "recompile_limit" in known else _with_limit(compiled)

    def __call__(self, block: nn.Module) -> None:
        """Compile a block, [B, S, H] -> [B, S, H]."""
        block.forward = partial(self._forward, block)

    def of(self, make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        """What makes a block, compiled."""

        def made() -> nn.Module:
            block = make()
            self(block)
            return block

        return made


def _with_limit(compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same under torch's own limit for each function, which is 8 graphs of all engines together if nobody sets it.

    It is looked at in every call: torch keeps a setting for each thread, and what is recomputed in a backward pass is
    compiled in a thread of autograd's.
    """

    def forward(block: nn.Module, hidden: Tensor) -> Tensor:
        if torch._dynamo.config.recompile_limit < MOST_GRAPHS:
            torch._dynamo.config.recompile_limit = MOST_GRAPHS
        return compiled(block, hidden)

    return forward


def _forward(block: nn.Module, hidden: Tensor) -> Tensor:
    # Of the class: the instance's own is what calls this.
    return type(block).forward(block, hidden)
