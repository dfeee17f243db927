"""Small runs of pipelines, what is seen of them, and what they are held against."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from slope_dist.config import load_config
from slope_dist.engine.optimizer import OptimizerSettings, parameter_groups
from slope_dist.layers import Linear
from slope_dist.parallel.environment import discover
from slope_dist.parallel.layout import Layout
from slope_dist.sparse import SparseWeight
from slope_dist.training.build import stages
from tests import same_run
from tests.runs import (
    VOCAB_SIZE,
    allow_fp16,
    distance,
    newest,
    read_all,
    same_bits,
    samples_of,
    step_rows,
    watch_engines,
)

# What is not used here test_pipeline_module.py takes from here.
from tests.same_run import (
    BF16,
    EXACT,  # noqa: F401
    NORM,
    assert_rounded_masters,
    assert_same_masks,
    assert_same_rows,
    engine_of,  # noqa: F401
    far,  # noqa: F401
    masters_apart,
    relative,  # noqa: F401
)

TABLE = "decoder.embed_tokens.weight"

# With this seed no unit of a ReLU is so near its kink that the rounding of one layout puts it on the other side.
SMALL: dict[str, Any] = {"model__num_layers": 3, "run__seed": 1}
PP2: dict[str, Any] = {"parallel__pipeline": 2}
TP2: dict[str, Any] = {"parallel__tensor": 2}
SEQUENCE: dict[str, Any] = {"parallel__sequence_parallel": True}


def observed_run(config: str) -> dict[str, Any]:
    """Train; returns what this rank read, held and cut."""
    from slope_dist.training.trainer import Trainer

    loaded = load_config(config)
    if loaded.precision == "fp16":
        allow_fp16()
    parts: list[list[int]] = []
    sparse: set[str] = set()
    tables: list[Tensor] = []
    process_groups: list[int] = []
    released: list[weakref.ref] = []
    alive: list[bool] = []

    def watch(event: str, engine: Any, _: Any) -> None:
        if event == "built":
            alive.extend(reference() is not None for reference in released)
            released[:] = [weakref.ref(held) for held in (engine._engine, engine._adam, engine.module)]
            parts.append(list(getattr(engine.module, "parts", [])))
            process_groups.append(len(dist.distributed_c10d._world.pg_map))
            linears = [module for module in engine.module.modules() if isinstance(module, Linear)]
            sparse.update(linear.name for linear in linears if isinstance(linear.weight, SparseWeight))
        if event == "before close":
            tables[:] = [t.tensor.detach().clone() for t in engine._state.tensors if t.name == TABLE]

    watch_engines(watch)
    trainer = Trainer(loaded, discover())
    samples = samples_of(trainer)
    trainer.run()
    return {
        "samples": samples,
        "parts": parts,
        "sparse": sorted(sparse),
        "table": tables[0] if tables else None,
        "process groups": process_groups,
        "alive after the switch": alive,
        "expected parts": stages(loaded, trainer.derived),
    }


def maker_of_runs(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, list[dict[str, Any]]]]:
    """What makes `observed_run`s of the small pipeline."""
    return same_run.maker_of_runs(observed_run, corpus, tmp_path_factory, **SMALL)


# In fp32.
assert_same_run = partial(same_run.assert_same_run, norm=NORM, clipped=1.2)


def assert_same_run_rounded(found: Path, expected: Path) -> None:
    """In bf16 or fp16: each layout rounds the sums of gradients that it makes itself."""
    assert_same_rows(step_rows(found), step_rows(expected), loss=1e-4, norm=BF16, clipped=1.2)
    assert_rounded_masters(found)
    assert masters_apart(found, expected) <= BF16 / 4
    masters, others = (read_all(newest(run), "master") for run in (found, expected))
    assert distance(masters[TABLE], others[TABLE]) <= BF16
    assert_same_masks(found, expected)


def assert_tied(ranks: list[Any], layout: Layout) -> None:
    """The first stage's table and the last one's copy are the same bits; stages between have none."""
    first = ranks[: layout.tensor * layout.data]
    last = ranks[-len(first) :]
    for seen, copy in zip(first, last, strict=True):
        assert same_bits(seen["table"], copy["table"])
    assert all(seen["table"] is None for seen in ranks[len(first) : -len(first)])


def batches_of(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of random tokens."""
    draw = torch.Generator().manual_seed(seed)
    windows = torch.randint(VOCAB_SIZE, (count, 2, 17), generator=draw)
    return [(window[:, :-1].clone(), window[:, 1:].clone()) for window in windows]


def plain_groups(tensors: list[Any]) -> list[dict[str, Any]]:
    settings = OptimizerSettings((0.9, 0.95), 1e-5, 0.1, 0.1, 0.0)
    return [
        {key: value for key, value in group.items() if key != "name"} for group in parameter_groups(tensors, settings)
    ]
