"""What the runners of long trials share: which are meant, and a hash under which their results are valid."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol, TypeVar

import torch

ROOT = Path(__file__).resolve().parents[1]


class Named(Protocol):
    """What has a name."""

    @property
    def name(self) -> str:
        """For the command line."""


AnyNamed = TypeVar("AnyNamed", bound=Named)


def choose(items: Iterable[AnyNamed], globs: list[str]) -> list[AnyNamed]:
    """Those whose name matches one of `globs`; all where there are none."""
    return [item for item in items if not globs or any(fnmatchcase(item.name, glob) for glob in globs)]


def sources_hash(sources: Iterable[str], root: Path = ROOT) -> str:
    """A hash of the Python files under `sources` (files or folders of `root`), and of torch's version."""
    digest = hashlib.sha256(torch.__version__.encode())
    for source in sources:
        path = root / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
