"""Claims: MFU is of the whole run's tokens and all its cards, names its basis, and is not given where it cannot be.

Run: pytest tests/training/test_utilization.py
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from slope_dist.config import derive, load_config
from slope_dist.planning import gpus
from slope_dist.planning.flops import TrainingFlops
from slope_dist.training import utilization
from slope_dist.training.utilization import find_utilization, utilization_of
from tests.distributed import end_ranks
from tests.runs import pretrain, step_rows, write_config

FLOPS = TrainingFlops(matrices=9 * 10**9, attention=10**9, adapters=10**8)
H200 = "NVIDIA H200"


def test_a_known_card() -> None:
    found = utilization_of(FLOPS, [H200] * 4, "bf16")
    # 10 GFLOP a token; 98.94 tokens a millisecond on each of four cards of 989.4 TFLOPS.
    assert found.mfu(4 * 98_940 / 2) == pytest.approx(0.5)
    assert found.shown(4 * 98_940 * 0.4123) == ["MFU 41.2 % (dense-equivalent)"]
    assert found.basis == (
        "MFU (dense-equivalent): 10 GFLOP a token, forward and backward of the dense model, adapters not counted (0.1 "
        "GFLOP), of 989.4 TFLOPS, the dense 16-bit peak of NVIDIA H200"
    )


@pytest.mark.parametrize(
    ("cards", "precision", "why"),
    [
        ([None], "bf16", "on a CPU there is no peak to compare with"),
        (["NVIDIA L4"] * 2, "bf16", 'no peak is known here of "NVIDIA L4"'),
        ([H200, "NVIDIA H100 PCIe"], "bf16", "the ranks' cards differ: NVIDIA H100 PCIe, NVIDIA H200"),
        ([H200], "fp32", "the peaks known here are of 16-bit products, and precision is fp32"),
    ],
    ids=["cpu", "unknown", "different", "fp32"],
)
def test_no_number_where_there_is_no_peak(
    cards: list[str | None], precision: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = utilization_of(FLOPS, cards, precision)
    assert found.basis == f"no MFU: {why}" and found.mfu(1e6) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards[0] is not None)
    shown = found.shown(1000.0)
    assert shown == ([] if cards[0] is None else [f"{10 / len(cards):.1f} dense-equivalent TFLOP/s a GPU"])


def test_dense_and_sparse_runs_have_one_basis(tmp_path: Path) -> None:
    found = {}
    for pattern in ("dense", "2:4"):
        config = load_config(write_config(tmp_path / pattern[0], tmp_path, sparsity__pattern=pattern))
        found[pattern] = find_utilization(config, derive(config, 1)).flops_per_token
    # Two blocks of 4 h h + 2 h f elements and the head; attention 12 L h S.
    vocab = config.model.vocab_size
    by_hand = 6 * (2 * (4 * 32 * 32 + 2 * 32 * 64) + vocab * 32) + 12 * 2 * 32 * 16
    assert found == {"dense": by_hand, "2:4": by_hand}


def on_a_card(config: str) -> None:
    """As if the CPU were a card whose peak is known."""
    card = gpus.Peaks(dense=1e12, sparse=2e12, bandwidth=1e12)
    plain = utilization.utilization_of

    def known(flops: TrainingFlops, cards: list[str | None], precision: str) -> utilization.Utilization:
        utilization.peaks_of = lambda name: card
        return plain(flops, ["a card"] * len(cards), "bf16")

    utilization.utilization_of = known
    raise SystemExit(pretrain("--config", config))


def on_the_cpu(config: str) -> None:
    raise SystemExit(pretrain("--config", config))


def test_a_run_writes_it_down(corpus: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, corpus, training__steps=2, sparsity__kernels="reference")
    outcomes = end_ranks(on_a_card, 2, str(path), process_group=False)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].errors
    flops = find_utilization(load_config(path), derive(load_config(path), 2)).flops_per_token
    rows = step_rows(tmp_path / "run")
    for row in rows:
        # Two ranks, so two cards; four digits are kept.
        assert row["mfu"] == pytest.approx(flops * row["tokens_per_second"] / 2e12, abs=1e-4)
    assert len(rows) == 2 and len(re.findall(r"\| MFU \d+\.\d % \(dense-equivalent\) \|", outcomes[0].output)) == 2
    assert outcomes[0].output.count("MFU (dense-equivalent): ") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU")
def test_a_run_on_the_cpu_says_once_that_there_is_none(corpus: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, corpus, training__steps=2)
    [outcome] = end_ranks(on_the_cpu, 1, str(path), process_group=False)
    assert outcome.code == 0, outcome.errors
    assert outcome.output.count("MFU") == 1 and "no MFU: on a CPU there is no peak to compare with" in outcome.output
    assert not any("mfu" in row for row in step_rows(tmp_path / "run"))
