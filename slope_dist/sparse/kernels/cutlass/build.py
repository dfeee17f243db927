"""Compiling the kernels, at first use, into a cache folder.

    python -m slope_dist.sparse.kernels.cutlass.build --arch sm_80 sm_90a --compile-only

compiles every kernel without a GPU and prints what each takes of the card; without --compile-only the libraries are
kept, so that the first run need not wait for them. Each takes about a minute of one core for sm_90a, seconds for sm_80.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from slope_dist.sparse.kernels.cutlass import toolchain
from slope_dist.sparse.kernels.cutlass.library import Library
from slope_dist.sparse.kernels.cutlass.tiles import ELEMENTS, SOURCES, TILES, Tile
from slope_dist.sparse.kernels.cutlass.toolchain import Toolchain
from slope_dist.sparse.kernels.vendor import VendorError

# NDEBUG: a check in a kernel is a call, and calls make the compiler wait for every matrix instruction on Hopper.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xptxas", "-v")
LIBRARY = ("-shared", "-Xcompiler", "-fPIC", "-cudart", "static")
"""The CUDA runtime comes along: the library opens, and can be asked things, on machines without CUDA."""

SLOW = "Potential Performance Loss"


@dataclass(frozen=True)
class Usage:
    """What a kernel takes of a card, by the compiler's account; `warnings` are those about speed."""

    registers: int
    spilled: int
    warnings: tuple[str, ...]

    @classmethod
    def parse(cls, log: str) -> Usage:
        """From the log of a compilation with `-Xptxas -v`; the worst of its kernels.

        Raises:
            VendorError: if it tells of no kernel.
        """
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
        if not registers:
            raise VendorError("the compiler's log tells of no kernel")
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
        warnings = [line.partition(" in the function ")[0] for line in log.splitlines() if SLOW in line]
        return cls(max(registers), spilled, tuple(warnings))


def cache_folder() -> Path:
    """Where compiled libraries are kept, in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slope_dist" / "cutlass"


def command(tools: Toolchain, tile: Tile, dtype: torch.dtype, output: Path) -> list[str]:
    """How a kernel is compiled."""
    macros = [f"-D{name}={value}" for name, value in tile.macros(dtype).items()]
    source = Path(__file__).parent / SOURCES[tile.architecture]
    flags = [*FLAGS, *LIBRARY, f"-arch={tile.architecture}", f"-I{tools.include}"]
    return [str(tools.nvcc), *flags, *macros, str(source), "-o", str(output)]


def file_name(tools: Toolchain, tile: Tile, dtype: torch.dtype) -> str:
    """The name of a compiled kernel: of the same source, settings and versions, the same; of others, another."""
    source = (Path(__file__).parent / SOURCES[tile.architecture]).read_bytes()
    facts = (
        FLAGS,
        LIBRARY,
        tile.architecture,
        sorted(tile.macros(dtype).items()),
        tools.nvcc_version,
        tools.cutlass_version,
    )
    digest = hashlib.sha256(source + repr(facts).encode()).hexdigest()[:16]
    return f"{tile.architecture}-{_name(dtype)}-{tile}-{digest}.so"


def build(tools: Toolchain, tile: Tile, dtype: torch.dtype, folder: Path) -> Path:
    """The compiled kernel in `folder`, compiled now if it is not there; others who want it meanwhile wait.

    Raises:
        VendorError: if it cannot be compiled, or the folder is one that others may write to.
    """
    _own(folder)
    library = folder / file_name(tools, tile, dtype)
    if library.exists():
        return library
    try:
        with _locked(library.with_suffix(".lock")):
            if not library.exists():
                unfinished = library.with_suffix(f".{os.getpid()}.tmp")
                try:
                    compile_kernel(tools, tile, dtype, unfinished)
                    unfinished.replace(library)
                finally:
                    unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise _not_kept(folder, error) from error
    return library


def compile_kernel(tools: Toolchain, tile: Tile, dtype: torch.dtype, output: Path) -> str:
    """Compile one kernel into a library; returns the compiler's log.

    Raises:
        VendorError: with the compiler's first complaint.
    """
    # The compiler's own files would else lie in a folder that is small on some machines.
    environment = os.environ | {"TMPDIR": str(output.parent)}
    done = subprocess.run(command(tools, tile, dtype, output), capture_output=True, text=True, env=environment)
    log = done.stdout + done.stderr
    if done.returncode:
        complaint = next(
            (line for line in log.splitlines() if "error" in line), log.strip()[-300:] or "no reason given"
        )
        raise VendorError(f"CUTLASS {tile} for {tile.architecture} does not compile: {complaint}")
    return log


def _own(folder: Path) -> None:
    """Make a folder, or refuse one from which somebody else's code might be run."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError as error:
        raise _not_kept(folder, error) from error
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise VendorError(f"{folder}: others may write to it, so what lies there is not run")


def _not_kept(folder: Path, error: OSError) -> VendorError:
    return VendorError(f"{folder}: compiled kernels cannot be kept: {error.strerror or error}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(tools: Toolchain, tile: Tile, dtype: torch.dtype, folder: Path) -> tuple[str, bool]:
    """Compile one kernel and open it; what it takes, in words, and whether that is as it should be."""
    name = f"{tile.architecture} {_name(dtype)} {tile}"
    output = folder / file_name(tools, tile, dtype)
    start = time.monotonic()
    try:
        usage = Usage.parse(compile_kernel(tools, tile, dtype, output))
        Library(output)
    except VendorError as error:
        return f"{name}: {error}", False
    took = f"{name}: {usage.registers} registers, {usage.spilled} bytes spilled, {time.monotonic() - start:.0f} s"
    return "; ".join([took, *usage.warnings]), not usage.spilled and not usage.warnings


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 if every kernel compiles without spills and without warnings about speed, else 1."""
    parser = argparse.ArgumentParser(prog="python -m slope_dist.sparse.kernels.cutlass.build")
    parser.add_argument("--arch", nargs="+", choices=sorted(TILES), default=sorted(TILES), help="default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time; default: one a core")
    parser.add_argument("--compile-only", action="store_true", help="check that kernels compile, and keep none")
    chosen = parser.parse_args(arguments)
    kernels = [(tile, dtype) for arch in chosen.arch for tile in TILES[arch] for dtype in ELEMENTS]
    try:
        tools = toolchain.find()
        print(f"nvcc {tools.nvcc_version}, CUTLASS {tools.cutlass_version}", flush=True)
        with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(chosen.jobs) as pool:
            if not chosen.compile_only:
                for library in pool.map(lambda kernel: build(tools, kernel[0], kernel[1], cache_folder()), kernels):
                    print(library, flush=True)
                return 0
            good = True
            for text, well in pool.map(lambda kernel: _check(tools, kernel[0], kernel[1], Path(scratch)), kernels):
                print(text, flush=True)
                good &= well
            return 0 if good else 1
    except VendorError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
