"""Claim: the driver's version is read from what it says of itself, or is not known.

Run: pytest tests/parallel/test_gpus.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from slope_dist.parallel.gpus import driver_version

CLOSED = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC version:  gcc 12\n"
)
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@host)  2025-07-27\n"


@pytest.mark.parametrize(("text", "version"), [(CLOSED, "535.183.01"), (OPEN, "580.65.06"), ("", None), ("x", None)])
def test_the_drivers_version_is_what_it_says(text: str, version: str | None, tmp_path: Path) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == version


def test_without_a_driver_there_is_none(tmp_path: Path) -> None:
    assert driver_version(tmp_path / "version") is None
