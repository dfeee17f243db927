"""Runs a case by the real trainer and holds it against its control: what the matrix and the quick subset share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slope_dist.checkpoint import Checkpoint
from slope_dist.config import load_config
from slope_dist.parallel.environment import discover
from tests.distributed import run_ranks
from tests.layouts.cases import CLIPPING, FAMILIES, Case
from tests.runs import (
    STEPS,
    distance,
    evaluation_rows,
    read_all,
    relative,
    rows_of,
    step_rows,
    watch_batches,
    write_config,
)

State = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """What a finished run left.

    Attributes:
        rows: the steps' rows of its metrics.
        evaluation: loss of the evaluation after the last step.
        samples: (step, position in the global batch, number of the sample, hash of its tokens and labels), sorted.
        weights: logical weights after the last step, gathered; fp32 masters where the model is narrower.
        metadata: forward masks after the first and after the last step, by step and name.
        gradients: the clipped gradient of every parameter in its first step, times (1 - beta1).
        last_moments: first moments after the last step.
        optimizer_steps: the optimizer's step counters at the end.
    """

    rows: list[dict[str, Any]]
    evaluation: float
    samples: list[list[Any]]
    weights: State
    metadata: State
    gradients: State
    last_moments: State
    optimizer_steps: dict[str, int]


@dataclass
class Deviation:
    """The largest relative deviations of a run from its control, and what was out of bounds.

    `gradient` and `weight` come with the name of the tensor that is furthest off.
    """

    steps: int
    loss: float
    norm: float
    weight: float
    weight_name: str
    gradient: float
    gradient_name: str
    problems: list[str] = field(default_factory=list)


def observed_run(config: str) -> list[list[Any]]:
    """Train as the config says; returns what `Run.samples` says, for this rank."""
    from slope_dist.training.trainer import Trainer

    trainer = Trainer(load_config(config), discover())
    samples: list[list[Any]] = []

    def record(step: int, positions: Any, made: Any) -> None:
        for row, position in enumerate(positions):
            text = torch.cat([made.tokens[row], made.labels[row]]).numpy().tobytes()
            samples.append([step, int(position), int(made.samples[row]), hashlib.sha256(text).hexdigest()[:16]])

    watch_batches(trainer, record)
    trainer.run()
    return samples


def run_case(case: Case, folder: Path, corpus: Path, **changes: Any) -> Run:
    """Run a case in `folder`, with `changes` to its config beside its own.

    Raises:
        AssertionError: if a rank fails, hangs, ranks that share a data rank read different samples, or copies differ
            after a step.
    """
    config = write_config(folder, corpus, **({"watch__drift_interval": 1} | case.changes | changes))
    ranks = case.layout.world_size
    seen = run_ranks(observed_run, ranks, str(config), timeout=90.0 + 30.0 * ranks)
    run = folder / "run"
    drift = [row for row in rows_of(run) if "drift" in row]
    assert not drift, f"what several ranks hold differs: {drift[0]}"
    checkpoints = {step: Checkpoint.open(run / "checkpoints" / f"step-{step:08d}") for step in (1, STEPS)}
    gradients = read_all(checkpoints[1], "exp_avg")
    last_moments = read_all(checkpoints[STEPS], "exp_avg")
    if case.first_adapter_step is not None and case.bounds.adapters:
        joined = Checkpoint.open(run / "checkpoints" / f"step-{case.first_adapter_step:08d}")
        gradients |= {name: t for name, t in read_all(joined, "exp_avg").items() if ".adapter." in name}
    [evaluation] = evaluation_rows(run)
    return Run(
        rows=step_rows(run),
        evaluation=evaluation["eval_loss"],
        samples=_samples(case, seen),
        weights=read_all(checkpoints[STEPS], "weight" if case.precision == "fp32" else "master"),
        metadata={
            f"{name} after step {step}": tensor
            for step, checkpoint in checkpoints.items()
            for name, tensor in read_all(checkpoint, "metadata").items()
        },
        gradients=gradients,
        last_moments=last_moments,
        optimizer_steps=dict(checkpoints[STEPS].scalars["optimizer_steps"]),
    )


def _samples(case: Case, seen: list[list[list[Any]]]) -> list[list[Any]]:
    """All data ranks' samples together; tensor ranks and stages of a data rank must have read the same."""
    by_data_rank: dict[int, list[list[Any]]] = {}
    for rank, samples in enumerate(seen):
        data_rank = case.layout.position(rank).data
        assert by_data_rank.setdefault(data_rank, samples) == samples, f"rank {rank} read other samples than its peers"
    return sorted(sample for samples in by_data_rank.values() for sample in samples)


def compare(case: Case, found: Run, expected: Run) -> Deviation:
    """Hold a run against its control by the case's bounds."""
    bounds = case.bounds
    problems: list[str] = []
    if [row["step"] for row in found.rows] != list(range(1, STEPS + 1)):
        problems.append(f"steps {[row['step'] for row in found.rows]}")
    pairs = list(zip(found.rows, expected.rows, strict=False))
    for key in ("lr", "phase", "tokens", "skipped"):
        if any(mine.get(key) != other.get(key) for mine, other in pairs):
            problems.append(f"{key} differs")
    if not all(row["grad_norm"] > 1.5 * CLIPPING for row in expected.rows):
        problems.append("clipping was meant to be active in every step")
    losses = [relative(mine["loss"], other["loss"]) for mine, other in pairs]
    losses.append(relative(found.evaluation, expected.evaluation))
    norms = [relative(mine["grad_norm"], other["grad_norm"]) for mine, other in pairs]
    before = case.first_adapter_step - 1 if case.first_adapter_step is not None else len(norms)
    weight, weight_name = _furthest(case, found.weights, expected.weights, "weights", problems)
    gradient, gradient_name = _furthest(case, found.gradients, expected.gradients, "gradients", problems)
    result = Deviation(
        len(found.rows), _largest(losses), _largest(norms), weight, weight_name, gradient, gradient_name, problems
    )
    for what, value, bound, where in (
        ("loss", result.loss, bounds.loss, ""),
        ("gradient norm", _largest(norms[:before]), bounds.norm, "before the adapters join"),
        ("gradient norm", _largest(norms[before:] or norms), bounds.later_norm, "after the adapters have joined"),
        ("weight", weight, bounds.weight, weight_name),
        ("first gradient", gradient, bounds.gradient, gradient_name),
    ):
        # Not `value > bound`: NaN must not pass.
        if bound is not None and not value <= bound:
            problems.append(f"{what} is off by {value:.1e}, allowed are {bound:.0e} {where}".rstrip())
    problems += _rounding_only(case, found)
    if found.samples != expected.samples:
        problems.append("other samples were read")
    problems += _masks(case, found.metadata, expected.metadata)
    if found.optimizer_steps != expected.optimizer_steps:
        problems.append(f"optimizer steps {found.optimizer_steps} instead of {expected.optimizer_steps}")
    return result


def _largest(values: list[float]) -> float:
    """The maximum, NaN if any is."""
    return max((value if value == value else inf for value in values), default=inf)


def _is_without_gradient(case: Case, name: str) -> bool:
    return any(fnmatchcase(name, glob) for glob in FAMILIES[case.family].without_gradient)


def _furthest(case: Case, found: State, expected: State, what: str, problems: list[str]) -> tuple[float, str]:
    """Largest distance and whose it is; of all but those that get rounding alone."""
    if found.keys() != expected.keys() or not expected:
        problems.append(f"other {what}: {sorted(found.keys() ^ expected.keys())[:3]} or none at all")
        return inf, ""
    distances = {
        name: distance(found[name], expected[name]) for name in expected if not _is_without_gradient(case, name)
    }
    name = max(distances, key=lambda name: distances[name])
    return distances[name], name


def _rounding_only(case: Case, found: Run) -> list[str]:
    """What leaves parameters out of the comparison must hold: that they get no gradient but rounding."""
    problems = []
    for when, state in (("first step", found.gradients), ("last step", found.last_moments)):
        total = float(torch.stack([tensor.double().norm() for tensor in state.values()]).norm())
        for name, tensor in state.items():
            if _is_without_gradient(case, name) and not float(tensor.double().norm()) <= case.bounds.rounding * total:
                problems.append(f"{name} has a gradient in the {when}")
    for glob in FAMILIES[case.family].without_gradient:
        if not any(fnmatchcase(name, glob) for name in found.gradients):
            problems.append(f"no parameter is called {glob}")
    return problems


def _masks(case: Case, found: State, expected: State) -> list[str]:
    """Forward masks must agree in every bit, and be there if the run is sparse."""
    if found.keys() != expected.keys() or bool(expected) != (case.pattern != "dense"):
        return [f"{len(found)} masks instead of {len(expected)}"]
    return [f"the mask {name} differs" for name in expected if not torch.equal(found[name], expected[name])][:3]
