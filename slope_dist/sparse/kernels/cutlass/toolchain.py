"""The compiler and the CUTLASS headers of this machine."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from slope_dist.sparse.kernels.vendor import VendorError


@dataclass(frozen=True)
class Toolchain:
    """What sources are compiled with."""

    nvcc: Path
    nvcc_version: str
    include: Path
    cutlass_version: str


def find() -> Toolchain:
    """The compiler of CUDA_HOME or PATH, and the headers of CUTLASS_PATH or of the package `nvidia-cutlass`.

    Raises:
        VendorError: naming what is missing and how to get it.
    """
    nvcc = _nvcc()
    include = _include()
    return Toolchain(nvcc, _nvcc_version(nvcc), include, _cutlass_version(include))


def _nvcc() -> Path:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    found = found or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise VendorError("CUTLASS needs nvcc, which is neither in CUDA_HOME nor in PATH: install the CUDA toolkit")
    return Path(found)


def _nvcc_version(nvcc: Path) -> str:
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise VendorError(f"CUTLASS needs nvcc, and {nvcc} --version fails: {error}") from error
    version = re.search(r"V(\d+\.\d+\.\d+)", text)
    if version is None:
        raise VendorError(f"CUTLASS needs nvcc, and {nvcc} --version names no version")
    return version.group(1)


def _include() -> Path:
    if chosen := os.environ.get("CUTLASS_PATH"):
        include = Path(chosen) / "include"
        if not _version_file(include).is_file():
            raise VendorError(f"CUTLASS_PATH is {chosen}, which has no include/cutlass/version.h")
        return include
    package = importlib.util.find_spec("cutlass_library")
    for folder in (package and package.submodule_search_locations) or ():
        include = Path(folder) / "source" / "include"
        if _version_file(include).is_file():
            return include
    raise VendorError(
        "CUTLASS headers are missing: pip install --no-deps nvidia-cutlass, or set CUTLASS_PATH to a clone of "
        "NVIDIA/cutlass"
    )


def _version_file(include: Path) -> Path:
    return include / "cutlass" / "version.h"


def _cutlass_version(include: Path) -> str:
    text = _version_file(include).read_text()
    parts = [re.search(rf"#define CUTLASS_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    if None in parts:
        raise VendorError(f"{_version_file(include)} names no version")
    return ".".join(part.group(1) for part in parts if part)
