"""What a number was measured on (rule R9): card or processor, threads, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def describe(device: torch.device) -> dict[str, object]:
    """Everything a reader needs to judge a number, as plain data."""
    facts: dict[str, object] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "commit": commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": round(os.getloadavg()[0], 2),
    }
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["card_memory"] = torch.cuda.get_device_properties(device).total_memory
    return facts


def processor() -> str:
    """The processor's name, as exactly as the system tells it."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Commit of this checkout, "+changes" if files differ from it; None outside a repository."""
    try:
        name = _git("rev-parse", "HEAD")
        return f"{name}+changes" if _git("status", "--porcelain", "--untracked-files=no") else name
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
