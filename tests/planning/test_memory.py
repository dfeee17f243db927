"""The predicted memory of a rank is what a real engine on real ranks takes.

Within 5 % of the bytes of all tensors, counted as operations make and free them, and within 15 % of the process's
resident memory above what it was when everything was imported: before the adapters, while they join, and after. Each
run has about 300 MB of model state or more. A few of the matrix's runs are in the quick suite. On a GPU, whose state
waits in host memory at the switch: within 10 % of what its allocator has given out. That nothing else of the old engine
is left, and what the new one takes, is seen on CPUs with the waiting state where it is not counted.

Run: pytest tests/planning/test_memory.py; all of the matrix: pytest tests/planning/test_memory.py -m slow
"""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from slope_dist.config import derive, load_config
from slope_dist.config.resolve import zero_stage
from slope_dist.planning.storages import StorageCounter
from slope_dist.training.forecast import forecast
from tests.distributed import run_ranks
from tests.planning.matrix import Case, cases
from tests.planning.measured import measure, peaks_on_gpu, switch_with_copies
from tests.runs import write_config

QUICK = ("ZeRO 1; bf16, 2:4",)
COUNTED, RESIDENT, UNTIL_UPDATE, ON_GPU = 0.05, 0.15, 0.10, 0.10
"""How far predictions may be off. What is there until the optimizer updates, on CPUs often the peak, is a GPU's."""
BESIDE_TENSORS = 32 * 2**20
"""Bytes that a CPU process takes beside its tensors, about: buffers of gloo and of the libraries of products."""

TIMEOUT = 600.0
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="predicts and measures runs on CPUs")


def check(case: Case, folder: Path) -> None:
    path = write_config(folder, folder, **case.changes)
    config = load_config(path)
    derived = derive(config, case.ranks)
    stages = forecast(config, derived, on_gpu=False)
    gathers = config.parallel.engine == "deepspeed" and zero_stage(config) in (1, 2) and derived.data_ranks > 1
    wrong = []
    for rank, found in enumerate(run_ranks(measure, case.ranks, str(path), timeout=TIMEOUT)):
        stage = stages[rank if len(stages) > 1 else 0]
        predicted = {"before peak": stage.before.bytes}
        if stage.after is not None and stage.switch is not None:
            predicted |= {"switch": stage.switch, "after peak": stage.after.bytes}
        assert predicted.keys() == found.keys() & {"before peak", "switch", "after peak"}
        for moment, size in predicted.items():
            resident = found[f"{moment.removesuffix(' peak')} resident"]
            # Loaded parameters are gathered from the data ranks, for which gloo takes as much again, in no tensor.
            beside = BESIDE_TENSORS + (stage.states[-1].weights if gathers and moment == "switch" else 0)
            ratios = size / found[moment], (size + beside) / resident
            print(f"{case.name}, rank {rank}, {moment}: {ratios[0]:.3f} counted, {ratios[1]:.3f} resident")
            # CPUs that compute in fp16 copy weights for it into memory of the library's own: up to 16 % more was seen.
            holds = config.precision == "fp16" or abs(ratios[1] - 1) <= RESIDENT
            if abs(ratios[0] - 1) > COUNTED or not holds:
                wrong.append((rank, moment, ratios))
        passes = stage.before.passes / found["before passes"]
        print(f"{case.name}, rank {rank}, until the update: {passes:.3f} counted")
        if abs(passes - 1) > UNTIL_UPDATE:
            wrong.append((rank, "until the update", (passes, passes)))
    assert not wrong


@ON_CPU
@pytest.mark.parametrize("case", [c for c in cases() if c.name.startswith(QUICK)], ids=lambda case: case.name)
def test_a_run_takes_what_was_predicted(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@ON_CPU
@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in cases() if not c.name.startswith(QUICK)], ids=lambda case: case.name)
def test_every_layout_takes_what_was_predicted(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", [c for c in cases() if c.ranks == 1], ids=lambda case: case.name)
def test_a_run_on_a_gpu_takes_what_was_predicted(case: Case, tmp_path: Path) -> None:
    path = write_config(tmp_path, tmp_path, **case.changes, sparsity__kernels="auto")
    config = load_config(path)
    [stage] = forecast(config, derive(config, 1), on_gpu=True)
    [found] = run_ranks(peaks_on_gpu, 1, str(path), timeout=TIMEOUT)
    predicted = {"before": stage.before.bytes}
    if stage.after is not None and stage.switch is not None:
        predicted |= {"switch": stage.switch, "after": stage.after.bytes}
    assert predicted.keys() == found.keys()
    assert all(abs(predicted[moment] / size - 1) <= ON_GPU for moment, size in found.items()), (predicted, found)


@ON_CPU
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=[] if c.name.startswith(QUICK) else pytest.mark.slow, id=c.name)
        for c in cases()
        if c.changes["sparsity__pattern"] == "2:4"
    ],
)
def test_the_switch_with_its_state_elsewhere_takes_what_was_predicted(case: Case, tmp_path: Path) -> None:
    path = write_config(tmp_path, tmp_path, **case.changes)
    config = load_config(path)
    stages = forecast(config, derive(config, case.ranks), on_gpu=True)
    for rank, found in enumerate(run_ranks(switch_with_copies, case.ranks, str(path), timeout=TIMEOUT)):
        stage = stages[rank if len(stages) > 1 else 0]
        assert stage.switch is not None and stage.after is not None
        print(f"{case.name}, rank {rank}: {stage.switch / found['switch']:.3f} counted, {found['left']} bytes left")
        assert abs(stage.switch / found["switch"] - 1) <= COUNTED
        # Constants of the libraries and the model's tables of positions.
        assert found["left"] < 0.01 * found["switch"]
        assert stage.switch < stage.after.bytes


def test_storages_count_once_and_until_the_last_view_is_gone() -> None:
    with StorageCounter() as counter:
        base = torch.empty(1000)
        view = base[:10]
        assert counter.bytes == 4000
        other = base + 1
        assert (counter.bytes, counter.peak) == (8000, 8000)
        del base, other
        gc.collect()
        assert counter.bytes == 4000
        del view
        gc.collect()
        assert (counter.bytes, counter.peak) == (0, 8000)
        torch.empty(1000, device="meta")
        assert counter.bytes == 0
