"""Every legal layout of a run on some GPUs, with the memory that each takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from slope_dist.config import Config, Derived, derive
from slope_dist.errors import UserError
from slope_dist.training.forecast import MARGIN, StageMemory, forecast
from slope_dist.transfer import size_text

MICRO_BATCHES = (1, 2, 4, 8)
"""That are tried; larger ones gain no speed on models that need a search."""

Changes = dict[str, Any]
"""Values by dotted path, as `--set` takes them."""

LEANEST: Changes = {"training.micro_batch_size": 1, "training.recompute": "blocks"}
"""A layout that does not fit even so is not looked at further."""


@dataclass(frozen=True)
class Candidate:
    """One layout.

    Attributes:
        changes: of the config, that make it so.
        config: the run in it.
        derived: its derived values.
        stages: what a rank of each pipeline stage takes; at least, where that does not fit.
        memory: bytes of a GPU.
    """

    changes: Changes
    config: Config
    derived: Derived
    stages: tuple[StageMemory, ...]
    memory: int

    @property
    def most(self) -> int:
        """Bytes of the fullest rank at its fullest."""
        return max(stage.most for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether that leaves the margin free."""
        return MARGIN * self.most <= self.memory

    @property
    def why_not(self) -> str:
        """What is too large; "" where it fits."""
        if self.fits:
            return ""
        stage = max(range(len(self.stages)), key=lambda number: self.stages[number].most)
        found = self.stages[stage]
        moments = {
            f"{found.before.moment} before the adapters": found.before.bytes,
            "the switch to adapters": found.switch or 0,
            f"{found.after.moment if found.after else ''} with adapters": found.after.bytes if found.after else 0,
        }
        moment = max(moments, key=lambda name: moments[name])
        where = f" in stage {stage + 1}" if len(self.stages) > 1 else ""
        return f"{moment}{where} takes at least {size_text(moments[moment])}, of {size_text(self.memory)}"

    def text(self) -> str:
        """The layout in words."""
        parallel, training = self.config.parallel, self.config.training
        engine = "fsdp" if parallel.engine == "fsdp" else f"ZeRO {parallel.zero_stage}"
        parts = [
            f"tensor {parallel.tensor}{' sp' if parallel.sequence_parallel else ''}",
            f"pipeline {parallel.pipeline}",
            f"data {self.derived.data_ranks}",
            engine,
            f"micro-batch {training.micro_batch_size}",
            f"recompute {training.recompute}",
        ]
        return ", ".join(parts)


def overrides(changes: Changes) -> list[str]:
    """As `--set` takes them."""
    return [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in changes.items()]


def search(
    make: Callable[[Changes], Config],
    *,
    gpus: int,
    gpus_per_node: int,
    memory: int,
    on_gpu: bool = True,
) -> list[Candidate]:
    """All layouts that the config may have, ranked.

    Args:
        make: the config with changes; raises `UserError` where they are not legal.
        gpus: how many there are, all of which are used.
        gpus_per_node: within which tensor ranks stay.
        memory: bytes of one.
        on_gpu: whether they are GPUs, or CPU processes.
    """
    found = []
    for changes in _changes(make({}), gpus, gpus_per_node):
        try:
            config = make(changes)
            derived = derive(config, gpus)
            lean = make(changes | LEANEST)
            stages = forecast(lean, derive(lean, gpus), on_gpu=on_gpu)
        except UserError:
            continue
        if Candidate(changes, config, derived, stages, memory).fits:
            stages = forecast(config, derived, on_gpu=on_gpu)
        found.append(Candidate(changes, config, derived, stages, memory))
    return rank(found)


def rank(found: Sequence[Candidate]) -> list[Candidate]:
    """Those that fit first, those that take least memory first."""
    return sorted(found, key=lambda candidate: (not candidate.fits, candidate.most))


def _changes(config: Config, gpus: int, gpus_per_node: int) -> Iterator[Changes]:
    model, batch = config.model, config.training.global_batch_size
    for tensor in _divisors(min(gpus, gpus_per_node)):
        if gpus % tensor or model.num_heads % tensor:
            continue
        for pipeline in _divisors(gpus // tensor):
            data = gpus // tensor // pipeline
            if pipeline > model.num_layers or batch % data:
                continue
            engines = [("deepspeed", stage) for stage in ((0, 1) if pipeline > 1 else (0, 1, 2, 3))]
            if config.precision != "fp32":
                # Stage 0 is run as stage 1.
                engines = engines[1:]
            if pipeline == 1 and config.precision != "fp16":
                engines.append(("fsdp", config.parallel.zero_stage))
            sizes = [size for size in MICRO_BATCHES if (batch // data) % size == 0]
            choices = product(engines, sizes, ("none", "blocks"), (False, True) if tensor > 1 else (False,))
            for (engine, stage), size, recompute, sequence in choices:
                yield {
                    "parallel.engine": engine,
                    "parallel.tensor": tensor,
                    "parallel.pipeline": pipeline,
                    "parallel.data": data,
                    "parallel.zero_stage": stage,
                    "parallel.sequence_parallel": sequence,
                    "training.micro_batch_size": size,
                    "training.recompute": recompute,
                }


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]
