"""Requests to stop, at random moments, of all sorts: what was done is saved, all ranks leave, and the run goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

from slope_dist.errors import EXIT_STOPPED
from slope_dist.training.stopping import STOP_FILE
from tests.distributed import end_ranks
from tests.faults.live import STEPS, WholeRuns, entry_point, failed, ranks_of, run_to_the_end, saved_steps, unlike

HOW = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGTERM SIGTERM", "SIGUSR1 SIGTERM", STOP_FILE)
LAYOUTS = ("one rank, ZeRO 0", "data 2, ZeRO 3", "pipeline 2, ZeRO 1", "tensor 2, ZeRO 2")
SPAN = 4.0
"""Seconds from the start of a process within which it is asked: building the engine, training, saving, evaluating."""


def asked(config: str, victims: list[int], how: str, seconds: float) -> None:
    """The real program; ranks of `victims` are asked to stop so many seconds after they have listened for it."""
    from slope_dist.training.stopping import Stopper

    if int(os.environ.get("RANK", "0")) in victims:
        listen = Stopper.listen

        def listened(self: Stopper) -> None:
            listen(self)
            threading.Thread(target=_ask, args=(Path(config).parent / "run", how, seconds), daemon=True).start()

        Stopper.listen = listened  # type: ignore[method-assign]
    entry_point(config)


def _ask(run: Path, how: str, seconds: float) -> None:
    time.sleep(seconds)
    if how == STOP_FILE:
        if run.is_dir():
            (run / STOP_FILE).touch()
        return
    for name in how.split():
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(0.05)


class AskedToStop:
    """One rank or all, once or twice."""

    def __init__(self, shared: Path) -> None:
        self.whole = WholeRuns(shared)

    def __call__(self, index: int, draw: random.Random, room: Path) -> str | None:
        """One request."""
        how, layout = HOW[index % len(HOW)], draw.choice(LAYOUTS)
        ranks = ranks_of(layout)
        victims = draw.choice([list(range(ranks)), [draw.randrange(ranks)]])
        if how == STOP_FILE:
            # Made again after it was obeyed, the file would stop the next run.
            victims = victims[:1]
        # The last step's checkpoint alone is due: others are those that a request makes.
        config = self.whole.config(room, layout, checkpoint__interval=0, evaluation__interval=3)
        seconds = draw.uniform(0, SPAN)
        where = f"{layout}: {how} to {victims} after {seconds:.2f} s"
        outcomes = end_ranks(asked, ranks, config, victims, how, seconds, process_group=False)
        codes = [outcome.code for outcome in outcomes]
        run = room / "run"
        if "Traceback" in "".join(outcome.errors for outcome in outcomes):
            return f"{where}: a traceback: {next(o.errors for o in outcomes if 'Traceback' in o.errors)[-600:]}"
        if codes == [0] * ranks:
            return unlike(run, self.whole.run(layout))
        if codes == [EXIT_STOPPED] * ranks and (run / "end.json").exists():
            end = json.loads((run / "end.json").read_text())
            if end["how"] != "stopped" or end["exit_code"] != EXIT_STOPPED:
                return f"{where}: end.json says {end}"
            if end["step"] and (saved_steps(run)[-1:] != [end["step"]] or end["step"] > STEPS):
                return f"{where}: stopped after step {end['step']}, saved are {saved_steps(run)}"
        # Before the first step ranks end by each other's death, with codes of their own.
        elif not all(codes):
            return f"{where}: codes {codes}"
        problem = failed(run_to_the_end(config, ranks)) or unlike(run, self.whole.run(layout))
        return None if problem is None else f"{where}: {problem}"
