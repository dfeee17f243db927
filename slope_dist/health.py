"""Whether this installation can run at all: `python -m slope_dist.health`, the health check of the containers.

It prints the versions and the number of GPUs; exit code 0, or 1 where torch or DeepSpeed cannot be imported or torch
does not see the GPUs that are there.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from slope_dist import __version__
from slope_dist.parallel.gpus import DRIVER, gpus_are_missed


def check(driver: Path = DRIVER) -> str:
    """Return what is installed, in one line; `driver` is there where GPUs have been given to this machine.

    Raises `ImportError` or `OSError` for a library that does not load, `RuntimeError` for GPUs that torch does not see.
    """
    import deepspeed
    import torch

    # Counts without a CUDA context, which would take memory on every GPU beside the run that is being watched.
    gpus = torch.cuda.device_count()
    if gpus_are_missed(gpus, driver):
        raise RuntimeError(f"torch {torch.__version__} sees no GPU though {driver} is there: is the driver too old?")
    versions = f"slope_dist {__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    return f"healthy: {versions}, CUDA {torch.version.cuda}, deepspeed {deepspeed.__version__}, {gpus} GPUs"


def main(driver: Path = DRIVER) -> int:
    """Print the answer; returns the exit code."""
    try:
        print(check(driver))
    except Exception as error:  # Whatever a broken library raises at its import.
        print(f"unhealthy: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
