"""Whether a card can be asked for segment-k: of some versions on some cards, making such a plan never returns.

A call that hangs in this process would hang it for good, so it is tried in another one, once, within a time limit.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

from slope_dist.sparse.kernels.cusparselt.library import Handle, Library
from slope_dist.sparse.kernels.cusparselt.plan import SEGMENT_K, Algorithm, Description, Plan
from slope_dist.sparse.kernels.vendor import VendorError

NAME = "segment-k"

TRIAL_SECONDS = 45
"""Importing torch, whose files this process has read before, and making a CUDA context included."""

SIZE = 1024

BEGUN = "asking for segment-k"
"""What a trial says once only the library's own calls are left."""

REFUSED = 3
"""Exit code of a trial that was told no; Python itself ends with 1 and 2."""


@cache
def answers(path: str, device: torch.device) -> bool | None:
    """Whether the library at a path makes a segment-k plan on a device and comes back from it; None: not known.

    A trial that hangs or crashes says no. One that cannot begin, as on a card for one process alone, does not.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    command = [sys.executable, "-m", __name__, path, str(device)]
    try:
        trial = subprocess.run(command, env=environment, capture_output=True, timeout=TRIAL_SECONDS)
    except subprocess.TimeoutExpired as expired:
        # A slow start is no answer, and this one is kept.
        return False if BEGUN.encode() in (expired.stdout or b"") else None
    except OSError:
        return None
    if trial.returncode == 0:
        return True
    return False if trial.returncode == REFUSED or trial.returncode < 0 else None


def main(path: str, device: str) -> int:
    """The trial: 0 if a segment-k plan was made with any algorithm, otherwise `REFUSED`."""
    handle = Handle(Library(Path(path)), torch.device(device))
    problem = SIZE, SIZE, SIZE, torch.bfloat16
    configs = Description(handle, *problem, bias=0).configs()
    print(BEGUN, flush=True)
    for config in configs:
        try:
            Plan(Description(handle, *problem, bias=0), Algorithm(config, SEGMENT_K), accumulate=False)
        except VendorError:
            continue
        return 0
    return REFUSED


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
