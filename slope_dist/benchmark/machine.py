"""What a number was measured on (rule R9): card or processor, threads, versions, commit."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]

COMMIT_VARIABLE = "SLOPE_COMMIT"
"""Of the environment: the commit of files that came to a machine without their repository."""

SETTING = (
    *("device", "kind", "threads", "python", "torch", "triton", "cuda", "vendors"),
    *("arrangement", "power_limit_watts", "commit", "changes"),
)
"""The facts that must be the same for numbers to stand in one table."""

BY_ROW = ("driver",)
"""Facts that may change within a table, as from one machine with the same card to the next; a row then has its own."""

_CARD_FACTS = {
    "driver": "driver_version",
    "power_limit_watts": "power.limit",
    "clock_mhz": "clocks.sm",
    "most_clock_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
}

_STATE_FACTS = {
    "clock_mhz": "clocks.sm",
    "power_watts": "power.draw",
    "celsius": "temperature.gpu",
    "clocks_event_reasons": "clocks_event_reasons.active",
}

_CODE = ("slope_dist", "tools")
_RESULTS = ":(exclude)docs/results"


def describe(device: torch.device) -> dict[str, object]:
    """Everything a reader needs to judge a number, as plain data."""
    facts: dict[str, object] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "kind": device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "commit": commit(),
        "changes": changes(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": round(os.getloadavg()[0], 2),
    }
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["card_memory"] = torch.cuda.get_device_properties(device).total_memory
        facts["triton"] = _version("triton")
        facts |= card(device)
    return facts


def card(device: torch.device) -> dict[str, object]:
    """Driver, clocks and power limit as nvidia-smi tells them; nothing where it does not."""
    return _told_of_card(device, _CARD_FACTS)


def state_of_card(device: torch.device) -> dict[str, object]:
    """Clock, power, temperature and what holds the clock down, now; nothing without a GPU."""
    return _told_of_card(device, _STATE_FACTS) if device.type == "cuda" else {}


def _told_of_card(device: torch.device, asked: Mapping[str, str]) -> dict[str, object]:
    identifier = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = f"GPU-{identifier}" if identifier is not None else str(device.index or 0)
    try:
        told = subprocess.run(
            ["nvidia-smi", f"--id={which}", f"--query-gpu={','.join(asked.values())}", "--format=csv,noheader"],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    values = told.stdout.strip().split(", ")
    if len(values) != len(asked):
        return {}
    return {name: value.removesuffix(" MHz").removesuffix(" W") for name, value in zip(asked, values, strict=True)}


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """What of the setting has changed, in words."""
    return [
        f"{name} was {_words(before.get(name))} and is {_words(now.get(name))}"
        for name in SETTING
        if before.get(name) != now.get(name)
    ]


def _words(value: object) -> str:
    return "unknown" if value is None else f'"{value}"' if isinstance(value, str) else str(value)


def processor() -> str:
    """The processor's name, as exactly as the system tells it."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Commit of this checkout, "+changes" if files differ from it; outside a repository what `COMMIT_VARIABLE` holds.

    Results do not count: they are written while it measures.
    """
    try:
        name = _git("rev-parse", "HEAD")
        return f"{name}+changes" if _git("status", "--porcelain", "--untracked-files=no", "--", ".", _RESULTS) else name
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT_VARIABLE) or None


def changes() -> str | None:
    """A short hash of how files differ from the commit, None if they do not; outside a repository one of all code."""
    try:
        text = _git("diff", "HEAD", "--", ".", _RESULTS).encode()
    except (OSError, subprocess.CalledProcessError):
        text = b"".join(path.read_bytes() for room in _CODE for path in sorted((ROOT / room).rglob("*.py")))
    return hashlib.sha256(text).hexdigest()[:12] if text else None


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True, errors="replace"
    ).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
