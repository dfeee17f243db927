"""Claim: of all limits on a process's memory and processor time, its control group's and those above, each is found.

Run: pytest tests/training/test_control_groups.py
"""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from slope_dist.training import memory
from slope_dist.training.control_groups import memory_limits, processor_limit


def found(folder: Path, own: str, files: dict[str, str], variables: dict[str, str] | None = None) -> list[int]:
    """The limits in a made tree of groups, least first."""
    for name, text in files.items():
        path = folder / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    (folder / "own").write_text(own)
    return sorted(memory_limits(folder / "groups", folder / "own", variables or {}))


V2 = {
    "memory.max": "900",
    "system.slice/memory.max": "max",
    "system.slice/slurmstepd.scope/memory.max": "700",
    "system.slice/slurmstepd.scope/job_7/memory.max": "500",
    "system.slice/slurmstepd.scope/job_7/step_0/memory.max": "max",
    "system.slice/slurmstepd.scope/job_8/memory.max": "1",
}


def test_version_2_from_the_own_group_upwards(tmp_path: Path) -> None:
    own = "0::/system.slice/slurmstepd.scope/job_7/step_0\n"
    assert found(tmp_path, own, V2) == [500, 700, 900]


def test_version_1_where_memory_is_one_of_several_controllers(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": "9223372036854771712",
        "memory/slurm/uid_0/job_7/memory.limit_in_bytes": "500",
        "memory/slurm/uid_0/memory.limit_in_bytes": "600",
        "cpu/slurm/memory.limit_in_bytes": "1",
        "memory/other/memory.limit_in_bytes": "1",
    }
    own = "12:cpu,cpuacct:/slurm\n4:hugetlb,memory:/slurm/uid_0/job_7\n1:name=systemd:/other\n0::/other\n"
    assert found(tmp_path, own, files) == [500, 600, 9223372036854771712]


@pytest.mark.parametrize("own", ["0::/\n", "0::/../../job\n", "0::/docker/not/mounted\n", "", "torn\n0:\n"])
def test_in_a_container_the_root_of_what_is_mounted_is_its_own_group(own: str, tmp_path: Path) -> None:
    assert found(tmp_path, own, {"memory.max": "400", "job/memory.max": "1"}) == [400]
    (tmp_path / "own").unlink()
    assert memory_limits(tmp_path / "groups", tmp_path / "own", {}) == [400]


@pytest.mark.parametrize(("value", "limits"), [("1000", [1000 * 2**20]), ("0", []), ("", []), ("4G", [])])
def test_what_slurm_gives_a_job(value: str, limits: list[int], tmp_path: Path) -> None:
    assert found(tmp_path, "", {}, {"SLURM_MEM_PER_NODE": value}) == limits


def test_the_least_of_the_machine_and_its_limits_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "16")
    assert memory._machine_memory() == 16 * 2**20
    monkeypatch.setattr(memory, "memory_limits", lambda: [2**62])
    assert memory._machine_memory() == psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/job/step\n", {"cpu.max": "max 100000", "job/cpu.max": "250000 100000", "job/step/cpu.max": "max"}, 2.5),
        ("0::/job/step\n", {"job/cpu.max": "200000 100000", "job/step/cpu.max": "800000 100000"}, 2.0),
        ("4:cpu,cpuacct:/job\n", {"cpu/job/cpu.cfs_quota_us": "50000", "cpu/job/cpu.cfs_period_us": "100000"}, 0.5),
        ("4:cpu:/job\n", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, None),
        ("0::/\n", {"cpu.max": "100000 100000", "other/cpu.max": "1 100000"}, 1.0),
        ("0::/\n", {"cpu.max": "torn"}, None),
    ],
)
def test_a_limit_of_processor_time(own: str, files: dict[str, str], limit: float | None, tmp_path: Path) -> None:
    found(tmp_path, own, files)
    assert processor_limit(tmp_path / "groups", tmp_path / "own") == limit
