"""Claim: a file is read only if it is a plain one of a size that was expected; nothing waits, and no memory is taken.

Run: pytest tests/test_files.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slope_dist.files import read_bounded


def test_a_plain_file_and_a_link_to_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    (tmp_path / "b").symlink_to("a")
    assert read_bounded(tmp_path / "a", 100) == read_bounded(tmp_path / "b", 100) == b"x" * 100


def test_a_larger_one_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="1099511627776 bytes, and at most 100 are expected"):
        read_bounded(tmp_path / "huge", 100)


def test_pipes_folders_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match=r"not a plain file|Is a directory"):
            read_bounded(path, 100)
    with pytest.raises(FileNotFoundError):
        read_bounded(tmp_path / "none", 100)
