"""How much host memory the processes here may have: limits of control groups and of a SLURM job."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
"""Which groups this process is in: "0::/path" of version 2, "4:memory:/path" of version 1."""


def memory_limits(
    groups: Path = GROUPS, own_groups: Path = OWN_GROUPS, variables: Mapping[str, str] | None = None
) -> list[int]:
    """Bytes of every limit that is set, of which the least holds; none where nothing limits this process.

    Args:
        groups: where the control groups are mounted.
        own_groups: the file that names this process's.
        variables: the environment; None: that of this process.
    """
    env = os.environ if variables is None else variables
    limits = []
    for path in _limit_files(groups, own_groups):
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):
            # Not there, or "max".
            continue
    in_mib = env.get("SLURM_MEM_PER_NODE", "")
    # 0 is all of the node.
    if in_mib.isdecimal() and int(in_mib) > 0:
        limits.append(int(in_mib) * 2**20)
    return limits


def _limit_files(groups: Path, own_groups: Path) -> Iterator[Path]:
    """Those of the process's group and of all above it, whose limits hold for it too."""
    # In a container the root of what is mounted is often its own group, whatever path it has outside.
    yield groups / "memory.max"
    yield groups / "memory" / "memory.limit_in_bytes"
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            root, name = groups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = groups / "memory", "memory.limit_in_bytes"
        else:
            continue
        parts = PurePosixPath(path).parts[1:]
        # "/../x" is outside of what is mounted here.
        if ".." not in parts:
            for depth in range(len(parts), 0, -1):
                yield root.joinpath(*parts[:depth]) / name
