"""Predicted memory is within 5 % of what tensors take and within 15 % of resident memory, in every layout of two ranks.

Real engines train on real ranks, over the adapter switch, with 300 MB of state and more. Storages are counted as
operations make and free them, resident memory is what the system says, above what it was after the imports. Tensors
are held against both after each phase's steps, at its fullest moment, and while the adapters join.

A few cases: pytest tests/planning/test_memory.py -m "not slow"
All, with a table of ratios (some 20 minutes): pytest tests/planning/test_memory.py -m slow -s
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slope_dist.config import derive, load_config
from slope_dist.training.forecast import forecast
from tests.distributed import run_ranks, skip_without_gpus
from tests.planning.matrix import Case, cases
from tests.planning.measured import measure
from tests.runs import write_config

STORAGES, RESIDENT, ON_GPU = 0.05, 0.15, 0.10
"""How far a prediction may be off, as a share of what is measured."""

LEAST_STATE = 300e6
"""Bytes of a whole model's state."""

CASES = {case.name: case for case in cases()}
QUICK = [name for name in CASES if name.startswith(("ZeRO 1; bf16, 2:4", "tensor 2; fp32, 2:4", "FSDP2; bf16, 2:4"))]


def predicted(path: str, ranks: int, on_gpu: bool) -> list[dict[str, int]]:
    """Bytes by moment of a rank of each stage. In a process of its own: nothing of it is in what is measured."""
    config = load_config(path)
    derived = derive(config, ranks)
    found = []
    for stage in forecast(config, derived, on_gpu=on_gpu):
        moments = {"before peak": stage.before.bytes, "before rest": stage.resting[0]}
        moments |= {"before state": stage.states[0].bytes}
        if stage.after is not None and stage.switch is not None:
            moments |= {"switch": stage.switch, "after peak": stage.after.bytes, "after rest": stage.resting[1]}
        found.append(moments)
    return found


def compare(case: Case, corpus: Path, folder: Path) -> dict[str, float]:
    """Predicted over measured by moment; of several ranks the one that is furthest off."""
    path = str(write_config(folder, corpus, **case.changes))
    [stages] = run_ranks(predicted, 1, path, case.ranks, False)
    ranks = run_ranks(measure, case.ranks, path)
    assert sum(stage["before state"] for stage in stages) * case.ranks / len(stages) >= LEAST_STATE
    ratios: dict[str, float] = {}
    for rank, measured in enumerate(ranks):
        # Ranks of a pipeline are its stages; all others hold alike.
        expected = stages[rank * len(stages) // case.ranks]
        for moment in (
            "before rest",
            "before peak",
            "before resident",
            "switch",
            "after rest",
            "after peak",
            "after resident",
        ):
            value = expected[moment.replace("resident", "peak")] / measured[moment]
            if abs(value - 1) >= abs(ratios.get(moment, 1.0) - 1):
                ratios[moment] = value
    return ratios


def judge(case: Case, ratios: dict[str, float]) -> None:
    print(f"{case.name}: " + ", ".join(f"{moment} {ratio:.3f}" for moment, ratio in ratios.items()))
    off = {
        moment: ratio
        for moment, ratio in ratios.items()
        if abs(ratio - 1) > (RESIDENT if "resident" in moment else STORAGES)
    }
    assert not off, f"{case.name}: predicted / measured {off}"


@pytest.mark.parametrize("name", QUICK)
def test_a_few(name: str, corpus: Path, tmp_path: Path) -> None:
    judge(CASES[name], compare(CASES[name], corpus, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_layout(name: str, corpus: Path, tmp_path: Path) -> None:
    judge(CASES[name], compare(CASES[name], corpus, tmp_path))


def peak_on_gpu(path: str) -> dict[str, int]:
    """The most that the allocator gives out in a phase before the adapters, on this rank's GPU."""
    from slope_dist.parallel.environment import discover
    from slope_dist.parallel.groups import start as start_groups
    from slope_dist.parallel.layout import Layout
    from slope_dist.training.build import build_engine
    from tests.planning.measured import micro_batches

    config = load_config(path)
    derived = derive(config, discover().world_size)
    groups = start_groups(Layout(config.parallel.tensor, derived.data_ranks, config.parallel.pipeline))
    engine = build_engine(config, derived, groups, adapters=False)
    engine.set_learning_rates({"base": 1e-4})
    torch.cuda.reset_peak_memory_stats()
    for step in (1, 2):
        engine.begin_step(step)
        engine.train_step(list(micro_batches(config, derived, torch.Generator().manual_seed(0))))
    found = {"before peak": torch.cuda.max_memory_allocated()}
    engine.close()
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.ranks == 1])
def test_on_a_gpu(name: str, corpus: Path, tmp_path: Path) -> None:
    skip_without_gpus(1)
    case = CASES[name]
    path = str(write_config(tmp_path, corpus, **case.changes))
    [[expected]] = run_ranks(predicted, 1, path, 1, True)
    [found] = run_ranks(peak_on_gpu, 1, path)
    assert abs(expected["before peak"] / found["before peak"] - 1) <= ON_GPU, (expected, found)
