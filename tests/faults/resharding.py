"""State and trajectory over all ordered pairs of layouts: saved in one, gone on with in the other."""

from __future__ import annotations

import json
import random
from itertools import permutations
from pathlib import Path

from slope_dist.checkpoint import Checkpoint, find_newest, save
from slope_dist.checkpoint.format import folder_name
from slope_dist.checkpoint.inspection import logical_hashes
from slope_dist.config import load_config
from slope_dist.parallel.environment import discover
from tests.distributed import run_ranks
from tests.faults.live import LAYOUTS, STEPS, WholeRuns, copy_checkpoint, ranks_of
from tests.runs import SECTIONS, relative, samples_of, step_rows, watch_engines

PAIRS = list(permutations(LAYOUTS, 2))
CUTS = (4, 8)
"""Before the adapters join, and after; the held column masks are of steps 1 and 6."""

BOUND = 1e-5
AGAIN = "again"
GLOBAL_BATCH = SECTIONS["training"]["global_batch_size"]


def gone_on(config: str, again: str, to_the_end: bool) -> list[list[int]]:
    """Resume, write down the state that was loaded, and go on or stop; returns the samples read."""
    from slope_dist.training.trainer import Trainer

    written = False

    def write(event: str, engine: object, _: object) -> None:
        nonlocal written
        if event == "loaded" and not written:
            written = True
            save(Path(again), 1, *engine.export_state(), {}, {})  # type: ignore[attr-defined]

    watch_engines(write)
    trainer = Trainer(load_config(config), discover())
    samples = samples_of(trainer)
    if to_the_end:
        trainer.run()
    else:
        trainer._start()
        trainer.close()
    return samples


class Resharding:
    """The first 56 trials are in fp32 and go on to the end; the other 56 load states in bf16, and stop there."""

    def __init__(self, shared: Path) -> None:
        self.whole = WholeRuns(shared)

    def __call__(self, index: int, draw: random.Random, room: Path) -> str | None:
        """One pair."""
        (source, target), bf16 = PAIRS[index % len(PAIRS)], index >= len(PAIRS)
        precision = {"precision": "bf16"} if bf16 else {}
        cut = draw.choice(CUTS)
        whole = self.whole.run(source, **precision)
        copy_checkpoint(whole, cut, room)
        before = Checkpoint.open(room / "run" / "checkpoints" / folder_name(cut), verify=False)
        config = self.whole.config(room, target, **precision)
        samples = run_ranks(gone_on, ranks_of(target), config, str(room / AGAIN), not bf16)
        after = find_newest(room / AGAIN).checkpoint
        assert after is not None
        stored, loaded = logical_hashes(before), logical_hashes(after)
        where = f"{source} -> {target} at step {cut}"
        if stored != loaded:
            differing = sorted(name for name in stored.keys() | loaded.keys() if stored.get(name) != loaded.get(name))
            return f"{where}: {len(differing)} logical tensors differ, first {differing[0]}"
        if before.scalars["optimizer_steps"] != after.scalars["optimizer_steps"]:
            return f"{where}: the step counters have changed: {after.scalars['optimizer_steps']}"
        return None if bf16 else self._trajectory(where, cut, whole, room / "run", samples)

    def _trajectory(self, where: str, cut: int, whole: Path, run: Path, samples: list[list[list[int]]]) -> str | None:
        rows, expected = step_rows(run), step_rows(whole)[cut:]
        if [row["step"] for row in rows] != [row["step"] for row in expected]:
            return f"{where}: steps {[row['step'] for row in rows]}"
        for mine, other in zip(rows, expected, strict=True):
            if not relative(mine["loss"], other["loss"]) <= BOUND or mine["phase"] != other["phase"]:
                return f"{where}: step {mine['step']}: loss {mine['loss']} in {mine['phase']}, was {other['loss']}"
        read = {tuple(row) for rank in samples for row in rank}
        for step in range(cut + 1, STEPS + 1):
            seen = sorted(sample for at, *row in read for sample in row if at == step)
            if seen != list(range((step - 1) * GLOBAL_BATCH, step * GLOBAL_BATCH)):
                return f"{where}: step {step} read samples {json.dumps(seen)}"
        return None
