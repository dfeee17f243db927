"""The predicted memory of a rank is what a real engine on real ranks takes.

Within 5 % of the bytes of all tensors, counted as operations make and free them, and within 15 % of the process's
resident memory above what it was when everything was imported: before the adapters, while they join, and after. Each
run has about 300 MB of model state or more. Three of the matrix's runs are in the quick suite.

Run: pytest tests/planning/test_memory.py; all of the matrix: pytest tests/planning/test_memory.py -m slow
"""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from slope_dist.config import derive, load_config
from slope_dist.planning.peaks import BESIDE_TENSORS
from slope_dist.planning.storages import StorageCounter
from slope_dist.training.forecast import forecast
from tests.distributed import run_ranks
from tests.planning.matrix import Case, cases
from tests.planning.measured import measure
from tests.runs import write_config

QUICK = ("ZeRO 1; fp32, dense", "alone, ZeRO 1; bf16, dense")
COUNTED, RESIDENT = 0.05, 0.15
TIMEOUT = 600.0

if torch.cuda.is_available():
    pytest.skip("predicts and measures runs on CPUs", allow_module_level=True)


def check(case: Case, folder: Path) -> None:
    path = write_config(folder, folder, **case.changes)
    config = load_config(path)
    stages = forecast(config, derive(config, case.ranks), on_gpu=False)
    wrong = []
    for rank, found in enumerate(run_ranks(measure, case.ranks, str(path), timeout=TIMEOUT)):
        stage = stages[rank if len(stages) > 1 else 0]
        predicted = {"before peak": stage.before.bytes}
        if stage.after is not None and stage.switch is not None:
            predicted |= {"switch": stage.switch, "after peak": stage.after.bytes}
        assert predicted.keys() == found.keys() & {"before peak", "switch", "after peak"}
        for moment, size in predicted.items():
            resident = found[f"{moment.removesuffix(' peak')} resident"]
            ratios = size / found[moment], (size + BESIDE_TENSORS) / resident
            print(f"{case.name}, rank {rank}, {moment}: {ratios[0]:.3f} counted, {ratios[1]:.3f} resident")
            if abs(ratios[0] - 1) > COUNTED or abs(ratios[1] - 1) > RESIDENT:
                wrong.append((rank, moment, ratios))
    assert not wrong


@pytest.mark.parametrize("case", [c for c in cases() if c.name.startswith(QUICK)], ids=lambda case: case.name)
def test_a_run_takes_what_was_predicted(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in cases() if not c.name.startswith(QUICK)], ids=lambda case: case.name)
def test_every_layout_takes_what_was_predicted(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


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
