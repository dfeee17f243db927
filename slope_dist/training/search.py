"""Every legal layout of a run on a cluster, with the memory and the time that each takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from slope_dist.config import Config, Derived, derive
from slope_dist.config.resolve import layout_text, zero_stage
from slope_dist.errors import UserError
from slope_dist.planning.cluster import Cluster
from slope_dist.planning.products import ProductTimes
from slope_dist.training.forecast import StageMemory, fits, forecast, most_of, predict_step
from slope_dist.transfer import size_text

_SIZE = "training.micro_batch_size"

Changes = dict[str, Any]
"""Values by dotted path, as `--set` takes them."""


@dataclass(frozen=True)
class Candidate:
    """One layout.

    Attributes:
        changes: of the config, that make it so.
        config: the run in it.
        derived: its derived values.
        stages: what a rank of each pipeline stage takes.
        memory: bytes of a GPU.
        seconds: of a step before the adapters.
    """

    changes: Changes
    config: Config
    derived: Derived
    stages: tuple[StageMemory, ...]
    memory: int
    seconds: float

    @property
    def most(self) -> int:
        """Bytes of the fullest rank at its fullest."""
        return most_of(self.stages)

    @property
    def fits(self) -> bool:
        """Whether that leaves the margin free."""
        return fits(self.stages, self.memory)

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
        return f"{moment}{where} takes {size_text(moments[moment])}, of {size_text(self.memory)}"

    def text(self) -> str:
        """The layout in words."""
        return f"{layout_text(self.config, self.derived.data_ranks)}, recompute {self.config.training.recompute}"


def overrides(changes: Changes) -> list[str]:
    """As `--set` takes them."""
    return [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in changes.items()]


def search(
    make: Callable[[Changes], Config],
    cluster: Cluster,
    times: ProductTimes,
    held: Collection[str] = (),
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[Candidate]:
    """All layouts that the config may have on all GPUs of a cluster, ranked. Tensor ranks stay within a node.

    Where a micro-batch does not fit, larger ones are left out.

    Args:
        make: the config with changes; raises `UserError` where they are not legal.
        cluster: the machines.
        times: of products on them.
        held: dotted paths whose values stay those of `make({})`.
        tell: called with how many layouts have been looked at, and of how many.
    """
    found: list[Candidate] = []
    too_large: set[tuple[Any, ...]] = set()
    start = make({})
    every = list(_changes(start, cluster.gpus, cluster.gpus_per_node))
    for number, changes in enumerate(every):
        tell(number, len(every))
        if any(name in held and _value(start, name) not in (value, None) for name, value in changes.items()):
            continue
        but_size = tuple(value for name, value in changes.items() if name != _SIZE)
        if but_size in too_large:
            continue
        try:
            config = make(changes)
            derived = derive(config, cluster.gpus)
        except UserError:
            continue
        stages = forecast(config, derived, on_gpu=True)
        seconds = predict_step(config, derived, cluster, times, adapters=False).total
        candidate = Candidate(changes, config, derived, stages, cluster.memory, seconds)
        if not candidate.fits:
            too_large.add(but_size)
        found.append(candidate)
    return rank(found)


def rank(found: Sequence[Candidate]) -> list[Candidate]:
    """Those that fit first, the fastest first, then those of least memory; the others by memory."""
    return sorted(found, key=lambda c: (not c.fits, c.seconds if c.fits else 0.0, c.most))


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
                engines.append(("fsdp", zero_stage(config)))
            sizes = sorted({1, 2, 4, 8, 16, 32, config.training.micro_batch_size})
            sizes = [size for size in sizes if (batch // data) % size == 0]
            choices = product(engines, sizes, ("none", "blocks"), (False, True) if tensor > 1 else (False,))
            for (engine, stage), size, recompute, sequence in choices:
                yield {
                    "parallel.engine": engine,
                    "parallel.tensor": tensor,
                    "parallel.pipeline": pipeline,
                    "parallel.data": data,
                    "parallel.zero_stage": stage,
                    "parallel.sequence_parallel": sequence,
                    _SIZE: size,
                    "training.recompute": recompute,
                }


def _value(config: Config, path: str) -> Any:
    if path == "parallel.zero_stage":
        # As it is run, which is how it is searched.
        return zero_stage(config)
    section, _, key = path.partition(".")
    return getattr(getattr(config, section), key)


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]
