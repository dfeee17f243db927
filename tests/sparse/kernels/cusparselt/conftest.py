"""The stand-in for cuSPARSELt, compiled once, and what it saw."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from slope_dist.sparse.kernels.cusparselt import CusparseltRoute

SOURCE = Path(__file__).with_name("standin.c")
ARGUMENTS = 11


@dataclass(frozen=True)
class Call:
    """One call of the library: its function without the prefix, its arguments as integers, zeros after the last."""

    name: str
    arguments: tuple[int, ...]


class StandIn:
    """The control side of standin.c."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        for name, result in (
            ("count", ctypes.c_int64),
            ("live", ctypes.c_int64),
            ("breach", ctypes.c_char_p),
            ("name", ctypes.c_char_p),
            ("arguments", ctypes.POINTER(ctypes.c_int64)),
        ):
            getattr(self._library, f"standin_{name}").restype = result
        for name in ("name", "arguments"):
            getattr(self._library, f"standin_{name}").argtypes = [ctypes.c_int64]
        self._library.standin_set.argtypes = [ctypes.c_char_p, ctypes.c_int64]

    def reset(self) -> None:
        self._library.standin_reset()

    def set(self, **settings: int) -> None:
        for name, value in settings.items():
            self._library.standin_set(name.encode(), value)

    def route(self, **options: int) -> CusparseltRoute:
        return CusparseltRoute(torch.device("cpu"), self.path, **options)

    def forget_calls(self) -> None:
        self._library.standin_forget_calls()

    @property
    def calls(self) -> list[Call]:
        return [
            Call(
                self._library.standin_name(number).decode().removeprefix("cusparseLt"),
                tuple(self._library.standin_arguments(number)[:ARGUMENTS]),
            )
            for number in range(self._library.standin_count())
        ]

    @property
    def names(self) -> list[str]:
        return [call.name for call in self.calls]

    @property
    def live(self) -> int:
        """Descriptors, selections and plans made and not destroyed."""
        return self._library.standin_live()

    @property
    def breach(self) -> str:
        """The first demand of the library's that a call did not meet."""
        return self._library.standin_breach().decode()


def build_standin(folder: Path) -> Path:
    """Compile the stand-in into a folder; the test is skipped where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) to build the stand-in for cuSPARSELt with")
    path = folder / "libcusparseLt.so.0"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(path), str(SOURCE), "-lm", "-lpthread"]
    subprocess.run(command, check=True)
    return path


def compile_standin(folder: Path) -> Path:
    """The stand-in as a library in a folder; FileNotFoundError without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("no C compiler (cc) to build the stand-in for cuSPARSELt with")
    path = folder / "libcusparseLt.so.0"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(path), str(SOURCE), "-lm", "-lpthread"]
    subprocess.run(command, check=True)
    return path


@pytest.fixture(scope="session")
def standin_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return compile_standin(tmp_path_factory.mktemp("standin"))
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def standin(standin_path: Path) -> Iterator[StandIn]:
    """A fresh stand-in; the test fails if a call did not keep to the library's contract."""
    library = StandIn(standin_path)
    library.reset()
    yield library
    assert not library.breach
