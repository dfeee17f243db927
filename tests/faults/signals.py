"""Requests to stop, at random moments, of all sorts: what was done is saved, all ranks leave, and the run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import psutil

from slope_dist.errors import EXIT_STOPPED
from slope_dist.training.stopping import STOP_FILE
from tests.faults.live import STEPS, WholeRuns, entry_point, ranks_of, saved_steps, unlike
from tests.runs import step_rows

HOW = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGTERM SIGTERM", "SIGUSR1 SIGTERM", STOP_FILE)
LAUNCHER = -1
"""The victim that is no rank: the command that started them."""
LAYOUTS = ("one rank, ZeRO 0", "data 2, ZeRO 3", "pipeline 2, ZeRO 1", "tensor 2, ZeRO 2")
SPAN = 4.0
"""Seconds from the start of a process within which it is asked: building the engine, training, saving, evaluating."""


def asked(config: str, victims: list[int], how: str, seconds: float) -> None:
    """The real program; ranks of `victims` are asked to stop so many seconds after they have listened for it.

    Where the victim is the launcher, rank 0 asks it: the `deepspeed` command, two processes above.
    """
    from slope_dist.training.stopping import Stopper

    rank = int(os.environ.get("RANK", "0"))
    victim = psutil.Process(os.getppid()).ppid() if victims == [LAUNCHER] else os.getpid()
    if rank in victims or (victims == [LAUNCHER] and rank == 0):
        listen = Stopper.listen

        def listened(self: Stopper) -> None:
            listen(self)
            threading.Thread(target=_ask, args=(Path(config).parent / "run", victim, how, seconds), daemon=True).start()

        Stopper.listen = listened  # type: ignore[method-assign]
    entry_point(config)


def _ask(run: Path, process: int, how: str, seconds: float) -> None:
    time.sleep(seconds)
    if how == STOP_FILE:
        if run.is_dir():
            (run / STOP_FILE).touch()
        return
    for name in how.split():
        # It is the launcher's right to be gone after the first.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, getattr(signal, name))
        time.sleep(0.05)


class AskedToStop:
    """One rank or all, or the launcher where there is one, once or twice."""

    def __init__(self, whole: WholeRuns) -> None:
        self.whole = whole

    def __call__(self, index: int, draw: random.Random, room: Path) -> str | None:
        """One request."""
        how, layout = HOW[index % len(HOW)], draw.choice(LAYOUTS)
        ranks = ranks_of(layout)
        choices = [list(range(ranks)), [draw.randrange(ranks)]]
        victims = draw.choice([*choices, [LAUNCHER]] if self.whole.launched else choices)
        if how == STOP_FILE:
            # Made again after it was obeyed, the file would stop the next run.
            victims = victims[:1]
        # The last step's checkpoint alone is due: others are those that a request makes.
        config = self.whole.config(room, layout, checkpoint__interval=0, evaluation__interval=3)
        seconds = draw.uniform(0, SPAN)
        where = f"{layout}: {how} to {victims} after {seconds:.2f} s"
        outcomes = self.whole.end(asked, layout, config, victims, how, seconds)
        codes = [outcome.code for outcome in outcomes]
        run = room / "run"
        if "Traceback" in "".join(outcome.errors for outcome in outcomes):
            return f"{where}: a traceback: {next(o.errors for o in outcomes if 'Traceback' in o.errors)[-600:]}"
        if codes == [0] * ranks:
            return unlike(run, self.whole.run(layout))
        # A launcher may end its other ranks while they leave; once a step has begun, the run itself must be stopped.
        if (run / "metrics.jsonl").exists() and step_rows(run):
            end = json.loads((run / "end.json").read_text())
            if end["how"] != "stopped" or end["exit_code"] != EXIT_STOPPED:
                return f"{where}: end.json says {end}"
            if end["step"] and (saved_steps(run)[-1:] != [end["step"]] or end["step"] > STEPS):
                return f"{where}: stopped after step {end['step']}, saved are {saved_steps(run)}"
        # Before the first step ranks end by each other's death, with codes of their own.
        if not all(codes):
            return f"{where}: codes {codes}"
        problem = self.whole.go_on(layout, config) or unlike(run, self.whole.run(layout))
        return None if problem is None else f"{where}: {problem}"
