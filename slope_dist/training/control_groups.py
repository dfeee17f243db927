"""How much host memory and processor time the processes here may have: limits of control groups and SLURM jobs."""

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
    for path in _limit_files(groups, own_groups, "memory", "memory.max", "memory.limit_in_bytes"):
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


def processor_limit(groups: Path = GROUPS, own_groups: Path = OWN_GROUPS) -> float | None:
    """Processors whose time this process may use together with its group, as `docker --cpus` sets it; None: all.

    A thread for every core of a large machine would be stopped for most of the time that it is waited for.
    """
    found = []
    for path in _limit_files(groups, own_groups, "cpu", "cpu.max", "cpu.cfs_quota_us"):
        try:
            quota, *period = path.read_text().split()
            if not period:
                period = path.with_name("cpu.cfs_period_us").read_text().split()
            share = int(quota) / int(period[0])
        except (OSError, ValueError, IndexError, ZeroDivisionError):
            # Not there, or "max".
            continue
        # -1 is no limit.
        if share > 0:
            found.append(share)
    return min(found, default=None)


def _limit_files(groups: Path, own_groups: Path, controller: str, name_2: str, name_1: str) -> Iterator[Path]:
    """Those of the process's group and of all above it, whose limits hold for it too, as versions 2 and 1 call them."""
    # In a container the root of what is mounted is often its own group, whatever path it has outside.
    yield groups / name_2
    yield groups / controller / name_1
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            root, name = groups, name_2
        elif controller in controllers.split(","):
            root, name = groups / controller, name_1
        else:
            continue
        parts = PurePosixPath(path).parts[1:]
        # "/../x" is outside of what is mounted here.
        if ".." not in parts:
            for depth in range(len(parts), 0, -1):
                yield root.joinpath(*parts[:depth]) / name
