"""One rank measures kernels for all, and leaves nothing behind that would count as the run's own memory.

The card is a stand-in that notes what is asked of it.

Run: pytest tests/training/test_products.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slope_dist.config import load_config
from slope_dist.sparse import kernels
from slope_dist.training import products
from tests.distributed import run_ranks
from tests.sparse.kernels.vendors import PlainAlgorithm, PlainVendor, preferring, vendors

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "tiny.json"


class Trying(PlainVendor):
    """Tries the card for minutes, unless it is known what that tells."""

    tried = 0

    def algorithms(self, problem: kernels.Problem) -> tuple[PlainAlgorithm, ...]:
        if "long" not in self.findings:
            self.tried += 1
            self.findings["long"] = True
        return self.kinds


def share() -> tuple[int, list[str]]:
    vendor, cpu = Trying(), torch.device("cpu")
    dispatcher = kernels.Dispatcher(cpu, vendors(vendor), timer=preferring("plain/1"))
    products.share_choices(dispatcher, [("product", kernels.Problem(16, 64, 64, torch.float32, cpu))])
    return vendor.tried, [choice["label"] for choice in dispatcher.as_data().values()]


def test_one_rank_tries_and_measures_for_all() -> None:
    tried, labels = zip(*run_ranks(share, 2), strict=True)
    assert tried == (1, 0) and list(labels) == [["plain/1 right"]] * 2


def test_what_measuring_took_is_not_in_the_runs_peak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments, name=name: asked.append(name))
    dispatcher = kernels.Dispatcher(torch.device("cpu"))
    monkeypatch.setattr(products, "make_dispatcher", lambda *arguments: dispatcher)
    monkeypatch.setattr(products, "product_uses", lambda *arguments: [])
    monkeypatch.setattr(products, "share_choices", lambda *arguments: asked.append("measured"))
    try:
        products.start_products(load_config(CONFIG), None, tmp_path)  # type: ignore[arg-type]
    finally:
        kernels.activate(None)
    assert asked == ["measured", "empty_cache", "reset_peak_memory_stats"]
