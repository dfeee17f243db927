"""MFU is said with its basis where all cards are the same known one, and with the reason where it is not.

Run: pytest tests/training/test_utilization.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from slope_dist.planning.flops import TrainingFlops
from slope_dist.training.utilization import utilization_of
from tests.distributed import run_ranks
from tests.runs import step_rows, train, write_config

FLOPS = TrainingFlops(matrices=5 * 10**9, attention=10**9, adapters=10**8)


def test_known_cards() -> None:
    found = utilization_of(FLOPS, ["NVIDIA H200", "NVIDIA H200"], "bf16")
    assert found.mfu(1e5) == pytest.approx(6e9 * 1e5 / (2 * 989.4e12))
    assert found.shown(1e5) == ["MFU 30.3 % (dense-equivalent)"]
    assert found.basis == (
        "MFU (dense-equivalent): 6 GFLOP a token, forward and backward of the dense model, adapters not counted "
        "(0.1 GFLOP), of 989.4 TFLOPS, the dense 16-bit peak of NVIDIA H200"
    )


@pytest.mark.parametrize(
    ("cards", "precision", "why"),
    [
        ([None], "bf16", "on a CPU"),
        (["Tesla T4"], "bf16", "Tesla T4"),
        (["NVIDIA H200", "NVIDIA H100 PCIe"], "bf16", "differ: NVIDIA H100 PCIe, NVIDIA H200"),
        (["NVIDIA H200", None], "bf16", "differ"),
        (["NVIDIA H200"], "fp32", "fp32"),
    ],
    ids=["CPU", "unknown", "two kinds", "one without", "fp32"],
)
def test_no_number_is_made_up(cards: list[str | None], precision: str, why: str) -> None:
    found = utilization_of(FLOPS, cards, precision)
    assert found.mfu(1e5) is None and found.basis.startswith("no MFU: ") and why in found.basis


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a run without a GPU")
def test_a_run_on_a_cpu_says_why_there_is_none(corpus: Path, tmp_path: Path) -> None:
    [outcome] = run_ranks(said, 1, str(write_config(tmp_path, corpus, training__steps=2)))
    assert outcome.count("no MFU: on a CPU there is no peak to compare with") == 1
    rows = step_rows(tmp_path / "run")
    assert rows and not any("mfu" in json.dumps(row) for row in rows)


def said(config: str) -> str:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as text:
        train(config)
    return text.getvalue()
