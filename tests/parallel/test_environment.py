"""The rank is read from whatever launched the process, and contradictions are told in one line.

Run: pytest tests/parallel/test_environment.py
"""

from __future__ import annotations

import pytest

from slope_dist.errors import UserError
from slope_dist.parallel.environment import Environment, discover

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_STEP_ID": "0",
}
ALONE = Environment(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="none")


@pytest.mark.parametrize("variables", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_launchers_that_set_rank(variables: dict[str, str]) -> None:
    found = discover(variables)
    assert found == Environment(5, 8, 1, 4, "deepspeed or torchrun")
    assert not found.is_first
    assert discover(variables | {"RANK": "0"}).is_first


def test_srun() -> None:
    assert discover(SRUN) == Environment(5, 8, 1, 4, "srun")


def test_torchrun_inside_a_slurm_job_is_torchrun() -> None:
    assert discover(SRUN | TORCHRUN | {"RANK": "2"}) == Environment(2, 8, 1, 4, "deepspeed or torchrun")


def test_no_launcher_is_one_process() -> None:
    assert discover({}) == ALONE
    # A shell inside an allocation, which srun did not start; and srun of a single task.
    assert discover({name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}) == ALONE
    assert discover(SRUN | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) == ALONE


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (TORCHRUN | {"RANK": "8"}, "rank 8 of 8"),
        (TORCHRUN | {"RANK": "-1"}, "rank -1 of 8"),
        (TORCHRUN | {"WORLD_SIZE": "eight"}, "WORLD_SIZE=eight"),
        ({"RANK": "0"}, r"WORLD_SIZE=\(unset\)"),
        (SRUN | {"SLURM_PROCID": "8"}, "rank 8 of 8"),
        (SRUN | {"SLURM_LOCALID": ""}, "SLURM_LOCALID="),
        (SRUN | {"SLURM_NTASKS": "eight"}, "SLURM_NTASKS=eight"),
    ],
)
def test_contradictions(variables: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        discover(variables)
    assert "\n" not in str(caught.value)
