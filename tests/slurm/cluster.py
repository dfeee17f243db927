"""A real, private SLURM of two nodes on this machine: its own munge, controller and two node daemons, in one folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed import ROOT

NODES = ("n0", "n1")
PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
STARTING, LASTING = 60.0, 300.0
"""Seconds for the daemons to be ready, and for whatever a test waits for on a busy machine."""

_CONF = """\
ClusterName=private
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={base}/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
SlurmdSpoolDir={base}/spool-%n
StateSaveLocation={base}/state
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd-%n.log
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=usual Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n0,n1 MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=10
"""


def missing() -> str:
    """Why there can be no SLURM here; "" if there can."""
    absent = [name for name in PROGRAMS if _program(name) is None]
    if absent:
        return f"SLURM is not installed: no {', '.join(absent)} (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "SLURM's daemons start jobs, for which they have to be root"


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Slurm:
    """The cluster, from `start` to `stop`.

    Args:
        base: an empty folder for all of its files.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in drop and not name.startswith(("SLURM_", "SBATCH_", "SLOPE_", "PYTEST_"))
        }
        self.environment = kept | {"SLURM_CONF": str(base / "slurm.conf"), "PYTHONPATH": str(ROOT)}

    def start(self) -> None:
        """Start the daemons and wait until both nodes take jobs."""
        ports = []
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                taken = stack.enter_context(socket.socket())
                taken.bind(("127.0.0.1", 0))
                ports.append(taken.getsockname()[1])
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.base / name).mkdir()
        (self.base / "slurm.conf").write_text(_CONF.format(host=socket.gethostname(), ports=ports, base=self.base))
        key = self.base / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        # Its socket has to be reached by jobs of any user, so munge asks for folders that everybody may enter.
        self.base.chmod(0o755)
        files = [f"--{kind}-file={self.base}/munge.{kind}" for kind in ("key", "log", "pid", "seed")]
        self.run("munged", "--force", f"--socket={self.base}/munge.socket", *files)
        self.run("slurmctld")
        for node in NODES:
            self.run("slurmd", "-N", node)
        self.wait("both nodes take jobs", lambda: self.nodes() == {node: "idle" for node in NODES}, STARTING)

    def stop(self) -> None:
        """End all jobs, then the daemons, by their numbers."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.run("scancel", "--user=root")
            self.run("scancel", "--user=root", "--signal=KILL", "--full")
            self.wait("no job is left", lambda: not self.run("squeue", "-h").strip(), 40)
        for name in (*(f"slurmd-{node}" for node in NODES), "slurmctld", "munge"):
            with contextlib.suppress(OSError, ValueError):
                process = int((self.base / f"{name}.pid").read_text())
                os.kill(process, signal.SIGTERM)
                end = time.monotonic() + 15
                while time.monotonic() < end:
                    os.kill(process, 0)
                    time.sleep(0.1)
                os.kill(process, signal.SIGKILL)

    def run(self, *command: str, check: bool = True, **variables: str) -> str:
        """A program of SLURM's; what it printed. It is to end with 0 if `check`."""
        program = _program(command[0])
        assert program is not None
        done = subprocess.run(
            [program, *command[1:]],
            env=self.environment | variables,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def wait(self, what: str, happened: Callable[[], object], seconds: float = LASTING) -> None:
        """Wait until something has happened; the daemons' own words are shown where it has not."""
        end = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > end:
                logs = "\n".join(
                    f"{path.name}: {line}"
                    for path in sorted(self.base.glob("*.log"))
                    for line in path.read_text(errors="replace").splitlines()[-15:]
                )
                pytest.fail(f"not within {seconds:.0f} s: {what}\n{self.run('squeue')}\n{logs}")
            time.sleep(0.1)

    def nodes(self) -> dict[str, str]:
        """The state of each node."""
        return dict(line.split() for line in self.run("sinfo", "-hN", "-p", "usual", "-o", "%N %t").splitlines())

    def state(self, job: str) -> str:
        """SLURM's word for a job: RUNNING, PENDING, COMPLETED, ..., or several for the elements of an array."""
        shown = self.run("scontrol", "show", "job", "--oneliner", job)
        return " ".join(part.removeprefix("JobState=") for part in shown.split() if part.startswith("JobState="))


@contextlib.contextmanager
def private_slurm(base: Path) -> Iterator[Slurm]:
    """A cluster that is ready, and gone afterwards."""
    slurm = Slurm(base)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
