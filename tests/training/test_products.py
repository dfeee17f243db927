"""Measuring kernels leaves nothing behind that would count as the run's own memory.

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

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "tiny.json"


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
