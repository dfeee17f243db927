"""Whether torch sees the GPUs that this machine has been given."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

DRIVER = Path("/dev/nvidiactl")
"""There wherever NVIDIA's driver is loaded, and in containers that have been given its GPUs."""


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
