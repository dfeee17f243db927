"""The ctypes declarations are those of the installed header, and what is wrong with a library is said in one line.

Run: pytest tests/sparse/kernels/cusparselt/test_library.py
With a header: an unpacked nvidia-cusparselt-cu13 wheel on PYTHONPATH.
"""

from __future__ import annotations

import ctypes.util
import re
import subprocess
import sys
from ctypes import c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path

import pytest
import torch

from slope_dist.sparse.kernels.cusparselt import library as binding
from slope_dist.sparse.kernels.cusparselt.library import Handle, Library, StatusError, Structure
from slope_dist.sparse.kernels.vendor import VendorError
from tests.sparse.kernels.cusparselt.conftest import StandIn

HEADERS = [
    path
    for entry in sys.path
    for folder in ("nvidia/cusparselt/include", "nvidia/cu13/include")
    if (path := Path(entry) / folder / "cusparseLt.h").is_file()
]
BY_VALUE = {"int64_t": c_int64, "uint32_t": c_uint32, "int32_t": c_int32, "size_t": c_size_t, "cudaStream_t": c_void_p}

needs_header = pytest.mark.skipif(not HEADERS, reason="no cusparseLt.h in nvidia/{cusparselt,cu13}/include on sys.path")
needs_library = pytest.mark.skipif(not binding.candidates(), reason="no libcusparseLt.so.0 on sys.path")


@pytest.fixture
def header() -> str:
    text = HEADERS[0].read_text()
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def prototypes(header: str) -> dict[str, list]:
    """Functions of a header with their parameters as ctypes."""
    found = {}
    for name, parameters in re.findall(r"CUSPARSELT_API\s+(\w+)\(([^)]*)\)", header):
        types = []
        for parameter in parameters.split(","):
            kind = parameter.replace("const ", "").split()[0]
            types.append(c_void_p if "*" in parameter else BY_VALUE.get(kind, c_int))
        found[name] = types
    return found


def enumerators(header: str) -> dict[str, int]:
    """Every name of every enumeration of a header."""
    found = {}
    for body in re.findall(r"typedef enum \{(.*?)\}", header, flags=re.DOTALL):
        value = -1
        for entry in filter(None, map(str.strip, body.split(","))):
            name, _, given = map(str.strip, entry.partition("="))
            value = int(given) if given else value + 1
            found[name] = value
    return found


@needs_header
def test_every_declared_function_is_the_headers(header: str) -> None:
    theirs = prototypes(header)
    assert {name: theirs[name] for name in binding.PROTOTYPES} == binding.PROTOTYPES


@needs_header
def test_every_constant_is_the_headers(header: str) -> None:
    theirs = enumerators(header)
    assert {name: theirs[name] for name in binding.CONSTANTS} == binding.CONSTANTS


@needs_header
def test_structures_are_as_large_and_aligned_as_the_headers(header: str) -> None:
    sizes = re.findall(r"alignas\((\d+)\) uint8_t data\[(\d+)\]", header)
    expected = (str(binding.STRUCTURE_ALIGNMENT), str(binding.STRUCTURE_BYTES))
    assert len(sizes) == 5 and set(sizes) == {expected}


@needs_header
@needs_library
def test_the_installed_library_opens_and_is_of_the_headers_version(header: str) -> None:
    parts = [re.search(rf"CUSPARSELT_VER_{part} (\d+)", header) for part in ("MAJOR", "MINOR", "PATCH")]
    assert Library().version == ".".join(part[1] for part in parts if part)


@needs_library
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to initialise on")
def test_the_installed_library_refuses_a_machine_without_gpu_in_one_line() -> None:
    with pytest.raises(
        StatusError, match=r"cuSPARSELt \d+\.\d+\.\d+: cusparseLtInit returned CUSPARSE_STATUS_\w+ \(.+"
    ):
        Handle(Library(), torch.device("cpu"))


def test_importing_opens_nothing() -> None:
    code = """
import torch  # A CUDA build opens its own copy.
opened = lambda: {line.split()[-1] for line in open("/proc/self/maps") if "cusparseLt" in line}
before = opened()
import slope_dist.sparse.kernels.cusparselt
print(opened() == before)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"


@pytest.mark.parametrize("off", [0, 4, 15])
def test_structures_are_aligned_wherever_their_memory_begins(off: int, monkeypatch: pytest.MonkeyPatch) -> None:
    address = ctypes.addressof
    monkeypatch.setattr(ctypes, "addressof", lambda memory: address(memory) + off)
    pointer = Structure().pointer.value
    assert pointer is not None and pointer % binding.STRUCTURE_ALIGNMENT == 0


@pytest.mark.parametrize(
    ("parts", "version"), [((0, 8, 1), "0.8.1"), ((0, 10, 0), "0.10.0"), ((1, 2, 3), "1.2.3")], ids=str
)
def test_the_version_is_asked_part_by_part(standin: StandIn, parts: tuple[int, int, int], version: str) -> None:
    standin.set(major=parts[0], minor=parts[1], patch=parts[2])
    assert standin.route().version == version


def message_of(path: Path) -> str:
    with pytest.raises(VendorError) as caught:
        Library(path)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def test_what_is_wrong_with_a_library_is_said_in_one_line(standin: StandIn, tmp_path: Path) -> None:
    assert "missing.so" in message_of(tmp_path / "missing.so")
    (tmp_path / "text.so").write_text("no library\n")
    assert "text.so" in message_of(tmp_path / "text.so")
    assert "cusparseLtInit" in message_of(Path(ctypes.util.find_library("c") or "libc.so.6"))
    standin.set(minor=7, patch=9)
    assert "0.7.9" in message_of(standin.path) and "older than 0.8.0" in message_of(standin.path)


def test_a_failing_call_names_itself_and_its_status(standin: StandIn) -> None:
    standin.set(init_status=10)
    with pytest.raises(StatusError) as caught:
        standin.route()
    message = "cuSPARSELt 0.8.1: cusparseLtInit returned CUSPARSE_STATUS_NOT_SUPPORTED (operation not supported)"
    assert str(caught.value) == message
    assert (caught.value.call, caught.value.status) == ("cusparseLtInit", 10)


def test_the_first_installed_copy_on_the_path_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = [
        tmp_path / entry / folder / binding.SONAME
        for entry, folder in (("first", "nvidia/cu13/lib"), ("second", "nvidia/cusparselt/lib"))
    ]
    for copy in copies:
        copy.parent.mkdir(parents=True)
        copy.touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), str(tmp_path / "none"), str(tmp_path / "second")])
    assert binding.candidates() == copies
