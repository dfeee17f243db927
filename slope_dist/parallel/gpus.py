"""The GPUs that this machine has been given: whether torch sees them, and by which driver."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

DRIVER = Path("/dev/nvidiactl")
"""There wherever NVIDIA's driver is loaded, and in containers that have been given its GPUs."""

VERSION_FILE = Path("/proc/driver/nvidia/version")
"""What the kernel's part of the driver says of itself."""


def driver_version(path: Path = VERSION_FILE) -> str | None:
    """The version of NVIDIA's driver, such as "570.86.15"; None where it is not said."""
    try:
        found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", path.read_text().splitlines()[0])
    except (OSError, IndexError, ValueError):
        return None
    return found[0] if found else None


def gpus_are_missed(seen: int | bool, driver: Path = DRIVER, variables: Mapping[str, str] | None = None) -> bool:
    """Whether torch ought to see GPUs and does not: they are there, and nobody has hidden them.

    Args:
        seen: how many torch sees, or whether any.
        driver: a file that is there where GPUs are.
        variables: the environment; None: that of this process.
    """
    env = os.environ if variables is None else variables
    hidden = env.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not seen and not hidden and driver.exists()
