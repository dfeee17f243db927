"""Programs: those in tools/, which lie beside the package and not in it, as modules of a test's own process; and any as
processes whose output nobody takes.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Literal

from tests.distributed import ROOT


def program(name: str) -> ModuleType:
    """tools/`name`.py, imported anew."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def output_to(what: Literal["nobody", "a full device"]) -> Iterator[int]:
    """A descriptor to write to: of a pipe whose reader has left, or of a device without room."""
    if what == "nobody":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open("/dev/full", os.O_WRONLY)
    try:
        yield writing
    finally:
        os.close(writing)


def run_python(*arguments: object, stdout: int, buffered: bool = True) -> subprocess.CompletedProcess[str]:
    """A Python program, its output buffered, as that into a pipe or a file is, or failing at once."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "" if buffered else "1"},
    )
