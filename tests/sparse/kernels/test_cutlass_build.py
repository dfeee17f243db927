"""CUTLASS kernels are compiled once for what they are made of, by whoever comes first, and what is missing is said.

The compiler is a stand-in; that the kernels compile is shown in test_cutlass_compiles.py.

Run: pytest tests/sparse/kernels/test_cutlass_build.py
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slope_dist.sparse.kernels.cutlass import build, library, tiles, toolchain
from slope_dist.sparse.kernels.cutlass.tiles import SOURCES, TILES
from slope_dist.sparse.kernels.cutlass.toolchain import Toolchain
from slope_dist.sparse.kernels.vendor import VendorError

FOLDER = Path(build.__file__).parent
TILE = TILES["sm_80"][0]
DTYPE = torch.float16

C_TYPES = {"int": ctypes.c_int, "const char*": ctypes.c_char_p}


def compiler(folder: Path, body: str) -> Path:
    """An executable that notes each of its compilations in `calls` beside it."""
    path = folder / "nvcc"
    version = 'if [ "$1" = --version ]; then echo "release 13.0, V13.0.88"; exit; fi'
    path.write_text(f'#!/bin/sh\n{version}\necho "$@" >> {folder}/calls\nfor last; do :; done\n{body}\n')
    path.chmod(0o755)
    return path


def tools_of(folder: Path, body: str = 'echo compiled > "$last"') -> Toolchain:
    return Toolchain(compiler(folder, body), "13.0.88", folder / "include", "4.2.0")


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def signatures(source: str) -> dict[str, tuple[object, list[object]]]:
    """What the extern "C" functions of a source return and take, as ctypes says it."""
    found = {}
    for returned, name, taken in re.findall(r'extern "C" (.+?)\b(slope_\w+)\(([^)]*)\)', source):
        kinds = [re.sub(r"\w+$", "", parameter.strip()).strip() for parameter in taken.split(",")]
        types = [ctypes.c_void_p if "void*" in kind else C_TYPES[kind] for kind in kinds]
        found[name] = (C_TYPES[returned.strip()], types)
    return found


@pytest.mark.parametrize("architecture", sorted(SOURCES))
def test_prototypes_are_those_of_the_sources(architecture: str) -> None:
    assert signatures((FOLDER / SOURCES[architecture]).read_text()) == library.PROTOTYPES


@pytest.mark.parametrize("architecture", sorted(SOURCES))
def test_every_macro_of_the_sources_is_given_and_no_other(architecture: str) -> None:
    used = set(re.findall(r"\bSLOPE_\w+", (FOLDER / SOURCES[architecture]).read_text()))
    for tile in TILES[architecture]:
        assert tile.architecture == architecture
        assert set(tile.macros(DTYPE)) == used


def test_names_of_tiles_are_their_own() -> None:
    for some in TILES.values():
        assert len({str(tile) for tile in some}) == len(some)


def test_the_command_names_architecture_macros_and_headers(tmp_path: Path) -> None:
    tools = tools_of(tmp_path)
    command = build.command(tools, TILES["sm_90a"][0], torch.bfloat16, tmp_path / "out")
    assert command[0] == str(tools.nvcc) and command[-2:] == ["-o", str(tmp_path / "out")]
    assert {"-arch=sm_90a", "-DSLOPE_ELEMENT=cutlass::bfloat16_t", f"-I{tmp_path}/include"} <= set(command)


def test_a_library_is_named_by_all_that_it_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tools_of(tmp_path)
    name = build.file_name(tools, TILE, DTYPE)
    assert name == build.file_name(replace(tools, nvcc=Path("/elsewhere/nvcc"), include=Path("/else")), TILE, DTYPE)
    others = [
        build.file_name(replace(tools, nvcc_version="13.0.89"), TILE, DTYPE),
        build.file_name(replace(tools, cutlass_version="4.2.1"), TILE, DTYPE),
        build.file_name(tools, TILE, torch.bfloat16),
        build.file_name(tools, replace(TILE, settings=(*TILE.settings[:-1], ("SLOPE_STAGES", 4))), DTYPE),
        build.file_name(tools, TILES["sm_90a"][0], DTYPE),
    ]
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    others.append(build.file_name(tools, TILE, DTYPE))
    monkeypatch.undo()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b" ")
    others.append(build.file_name(tools, TILE, DTYPE))
    assert len({name, *others}) == 1 + len(others)


def test_compiled_once_also_by_many_at_once(tmp_path: Path) -> None:
    tools = tools_of(tmp_path, 'sleep 0.3; echo compiled > "$last"')
    folder = tmp_path / "cache"
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build.build(tools, TILE, DTYPE, folder), range(4)))
    assert paths == {folder / build.file_name(tools, TILE, DTYPE)}
    assert len(calls(tmp_path)) == 1
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".so"]
    assert folder.stat().st_mode & 0o077 == 0


def test_what_fails_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    tools = tools_of(tmp_path, 'echo half > "$last"; echo "sm80.cu(3): error: no such thing" >&2; exit 1')
    folder = tmp_path / "cache"
    for _ in range(2):
        with pytest.raises(VendorError) as caught:
            build.build(tools, TILE, DTYPE, folder)
    assert str(caught.value) == "CUTLASS 128x128 for sm_80 does not compile: sm80.cu(3): error: no such thing"
    assert [path.suffix for path in folder.iterdir()] == [".lock"]
    assert len(calls(tmp_path)) == 2


def test_a_compiler_that_dies_is_waited_for_by_nobody(tmp_path: Path) -> None:
    """A process killed while compiling leaves a lock file that holds nothing."""
    tools = tools_of(tmp_path, 'touch $(dirname "$0")/started; exec sleep 60')
    folder = tmp_path / "cache"
    program = (
        "import sys, torch; from pathlib import Path\n"
        "from slope_dist.sparse.kernels.cutlass import build, tiles, toolchain\n"
        f"tools = toolchain.Toolchain(Path({str(tools.nvcc)!r}), '13.0.88', Path({str(tools.include)!r}), '4.2.0')\n"
        f"build.build(tools, tiles.TILES['sm_80'][0], torch.float16, Path({str(folder)!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    try:
        while not (tmp_path / "started").exists():
            assert process.poll() is None
        process.kill()
        process.wait()
        assert build.build(tools_of(tmp_path), TILE, DTYPE, folder).read_text() == "compiled\n"
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(VendorError, match="others may write to it"):
        build.build(tools_of(tmp_path), TILE, DTYPE, folder)
    assert not (tmp_path / "calls").exists()


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VendorError, match=r"file/cache: compiled kernels cannot be kept: Not a directory"):
        build.build(tools_of(tmp_path), TILE, DTYPE, tmp_path / "file" / "cache")


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(build.fcntl, "flock", refuse)
    with pytest.raises(VendorError, match="cache: compiled kernels cannot be kept: No locks available"):
        build.build(tools_of(tmp_path), TILE, DTYPE, tmp_path / "cache")


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "some.so").write_text("compiled\n")
    with pytest.raises(VendorError, match="is no compiled kernel"):
        library.Library(tmp_path / "some.so")


def headers(folder: Path) -> Path:
    include = folder / "include" / "cutlass"
    include.mkdir(parents=True)
    parts = (("MAJOR", 4), ("MINOR", 2), ("PATCH", 0))
    (include / "version.h").write_text("".join(f"#define CUTLASS_{name} {number}\n" for name, number in parts))
    return folder


def test_toolchain_of_cuda_home_and_cutlass_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    compiler(tmp_path / "bin", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CUTLASS_PATH", str(headers(tmp_path / "clone")))
    expected = Toolchain(tmp_path / "bin" / "nvcc", "13.0.88", tmp_path / "clone" / "include", "4.2.0")
    assert toolchain.find() == expected


def test_missing_compiler_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(toolchain.shutil, "which", lambda *arguments, **named: None)
    with pytest.raises(VendorError, match=r"^CUTLASS needs nvcc, which is neither in CUDA_HOME nor in PATH: install"):
        toolchain.find()


def test_missing_headers_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    compiler(tmp_path / "bin", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CUTLASS_PATH", raising=False)
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        VendorError, match=r"^CUTLASS headers are missing: pip install --no-deps nvidia-cutlass, or set"
    ):
        toolchain.find()
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    with pytest.raises(VendorError, match=f"^CUTLASS_PATH is {tmp_path}, which has no include/cutlass/version.h"):
        toolchain.find()


LOG = """ptxas info    : Compiling entry function 'product' for 'sm_80'
    0 bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 242 registers, used 1 barriers
"""
SLOW = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"


@pytest.mark.parametrize(
    ("log", "said", "code"),
    [
        (LOG.format(stores=0, loads=0), "242 registers, 0 bytes spilled", 0),
        (LOG.format(stores=8, loads=4), "242 registers, 12 bytes spilled", 1),
        (LOG.format(stores=0, loads=0) + SLOW + " due to a call in the function 'f'", SLOW + " due to a call", 1),
        ("nothing of kernels", "the compiler's log tells of no kernel", 1),
    ],
    ids=["good", "spills", "slow", "silent"],
)
def test_the_check_tells_of_each_kernel_and_fails_for_bad_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], log: str, said: str, code: int
) -> None:
    (tmp_path / "log").write_text(log)
    monkeypatch.setattr(toolchain, "find", lambda: tools_of(tmp_path, f"cat {tmp_path}/log >&2"))
    monkeypatch.setattr(build, "Library", lambda path: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "unused"))
    assert build.main(["--arch", "sm_80", "--compile-only", "--jobs", "2"]) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "nvcc 13.0.88, CUTLASS 4.2.0"
    kernels = len(TILES["sm_80"]) * len(tiles.ELEMENTS)
    assert len(lines) == 1 + kernels == 1 + len(calls(tmp_path))
    assert all(said in line for line in lines[1:])
    assert not (tmp_path / "unused").exists()


def test_without_a_compiler_the_check_says_so_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(toolchain.shutil, "which", lambda *arguments, **named: None)
    assert build.main(["--compile-only"]) == 1
    assert capsys.readouterr().err.startswith("CUTLASS needs nvcc")
