"""The rivals of `benchmark.py checkpoint`: one state, saved and loaded by three libraries, on two ranks of a machine.

The state is that of a real engine after a step. slope_dist writes it as its own checkpoint, "dcp", which is
torch.distributed.checkpoint, the same pieces under names of their own, DeepSpeed its engine's own files. The latter two
pickle, which nothing else in this project does; they read back what they have just written themselves.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slope_dist.benchmark import ranks
from slope_dist.checkpoint import Retention, Saver
from slope_dist.checkpoint.reader import find_newest_on_all_ranks
from slope_dist.config import Config, derive
from slope_dist.parallel import environment
from slope_dist.parallel.groups import start as start_groups
from slope_dist.parallel.layout import Layout
from slope_dist.training.build import build_engine

RANKS = 2
PATTERNS = ("dense", "2:4")
STAGES = (1, 3)
OURS, DCP, DEEPSPEED = "slope_dist", "dcp", "deepspeed"
HASH_CHUNK = 16 * 2**20
TIMEOUT = 3600.0


@dataclass(frozen=True)
class Size:
    """The model whose state is saved: an OPT in bf16, with fp32 masters and moments."""

    hidden_size: int = 1024
    num_layers: int = 14

    def config(self, pattern: str, stage: int) -> Config:
        """A run of it; its corpus is never opened."""
        return Config.model_validate(
            {
                "model": {
                    "hidden_size": self.hidden_size,
                    "num_layers": self.num_layers,
                    "num_heads": self.hidden_size // 8,
                    "ffn_size": 4 * self.hidden_size,
                    "vocab_size": 512,
                    "sequence_length": 8,
                },
                "sparsity": {"pattern": pattern},
                "adapters": {"rank": 0},
                "data": {"folder": "unused"},
                "training": {
                    "steps": 1,
                    "global_batch_size": RANKS,
                    "micro_batch_size": 1,
                    "learning_rate": 1e-4,
                },
                "precision": "bf16",
                "parallel": {"zero_stage": stage, "zero3_persistence_threshold": 0},
            }
        )


class Rival(ABC):
    """One library. Collective throughout."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Training waits until the state is saved, whether or not it has reached the disk."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Take the state back, as a run that resumes does."""

    def begin(self, folder: Path) -> Callable[[], None] | None:
        """What training waits for where the rest is written beside it; returns what waits for the rest."""
        return None


class Ours(Rival):
    """This project: hashed on the way, synced, verified before it is loaded."""

    def __init__(self, engine: Any, config: Config) -> None:
        super().__init__(engine)
        self.config = config.model_dump(mode="json")
        self.copying: Saver | None = None

    def saver(self, folder: Path, *, asynchronous: bool) -> Saver:
        """A saver to an empty folder."""
        return Saver(folder / "checkpoints", Retention(folder / "checkpoints", keep=2), asynchronous=asynchronous)

    def save(self, folder: Path) -> None:
        """Without a copy."""
        saver = self.saver(folder, asynchronous=False)
        saver.save(1, self.engine.export_state, {}, self.config, patience=lambda: 0.0)
        self.finish(saver)

    def finish(self, saver: Saver) -> None:
        """Wait for the save, and see whether it is there."""
        saver.wait()
        problems = [problem for outcome in saver.outcomes() for problem in outcome.problems]
        if problems:
            raise RuntimeError(problems[0])

    def begin(self, folder: Path) -> Callable[[], None]:
        """From a copy in host memory."""
        # One saver for all saves of a run: only its first makes the buffers.
        if self.copying is None:
            self.copying = self.saver(folder, asynchronous=True)
        saver = self.copying
        saver.save(1, self.engine.export_state, {}, self.config)
        return lambda: self.finish(saver)

    def load(self, folder: Path) -> None:
        """Verified, then loaded."""
        found = find_newest_on_all_ranks(folder / "checkpoints")
        assert found.checkpoint is not None, found.skipped
        self.engine.load_state(found.checkpoint)


class Dcp(Rival):
    """torch.distributed.checkpoint with its own file writer, which syncs what it writes."""

    group: dist.ProcessGroup | None = None

    def state(self) -> dict[str, Tensor]:
        """What this rank writes, under names that no other rank has, so that nothing is taken for a replica."""
        return pieces(self.engine)

    def save(self, folder: Path) -> None:
        """In place."""
        from torch.distributed import checkpoint

        checkpoint.save(self.state(), checkpoint_id=folder / "dcp")

    def begin(self, folder: Path) -> Callable[[], None]:
        """From the copy that it makes itself."""
        from torch.distributed import checkpoint

        # On the default group its thread's collectives would meet those of training.
        self.group = self.group or dist.new_group(backend="gloo")
        response: Any = checkpoint.async_save(self.state(), checkpoint_id=folder / "dcp", process_group=self.group)
        return lambda: response.result()

    def load(self, folder: Path) -> None:
        """In place."""
        from torch.distributed import checkpoint

        checkpoint.load(self.state(), checkpoint_id=folder / "dcp")
        # As the others do: the ranks' copies of the weights follow the masters.
        self.engine._state.sync()


class DeepSpeed(Rival):
    """DeepSpeed's engine and its own files, which it does not sync."""

    def save(self, folder: Path) -> None:
        """Into a folder of its own."""
        self.engine._engine.save_checkpoint(str(folder / "deepspeed"), tag="1")

    def load(self, folder: Path) -> None:
        """Weights, optimizer and counters."""
        path, _ = self.engine._engine.load_checkpoint(str(folder / "deepspeed"), tag="1")
        assert path is not None


def pieces(engine: Any) -> dict[str, Tensor]:
    """The live pieces of the state that this rank writes."""
    return {
        f"{dist.get_rank()}/{piece.kind}/{piece.name}/{piece.start}": piece.tensor
        for piece in engine.export_state()[0]
        if piece.write
    }


def fingerprint(engine: Any) -> str:
    """A hash of this rank's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(pieces(engine).items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def clocked(run: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds until all ranks are done, from when all begin, and what it returned."""
    dist.barrier()
    start = time.perf_counter()
    result = run(*arguments)
    dist.barrier()
    return time.perf_counter() - start, result


def sync_files(folder: Path) -> None:
    """On rank 0: what is in the folder has reached the disk."""
    if dist.get_rank() == 0:
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def hash_alone(engine: Any) -> None:
    """What hashing costs a save: SHA-256 of the bytes that this rank writes."""
    digest = hashlib.sha256()
    for tensor in pieces(engine).values():
        data = tensor.view(torch.uint8).numpy()
        for start in range(0, len(data), HASH_CHUNK):
            digest.update(data[start : start + HASH_CHUNK])


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check(rival: Rival, name: str, folder: Path) -> None:
    """Save, spoil the state, load, and compare.

    Raises:
        RuntimeError: on the rank where it is another.
    """
    before = fingerprint(rival.engine)
    rival.save(folder)
    dist.barrier()
    for tensor in pieces(rival.engine).values():
        tensor.zero_()
    if fingerprint(rival.engine) == before:
        raise RuntimeError("the state is all zeros to begin with")
    rival.load(folder)
    if fingerprint(rival.engine) != before:
        raise RuntimeError(f"{name} loaded another state than it had saved")


def measure_state(size: Size, pattern: str, stage: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """The row of one state: bytes, and per rival the seconds of every round. Collective."""
    config = size.config(pattern, stage)
    groups = start_groups(Layout(data=RANKS))
    engine: Any = build_engine(config, derive(config, RANKS), groups, adapters=False)
    tokens = torch.randint(512, (1, 9), generator=torch.Generator().manual_seed(dist.get_rank()))
    engine.begin_step(1)
    engine.set_learning_rates({"base": 1e-4})
    engine.train_step([(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())])
    rivals: dict[str, Rival] = {OURS: Ours(engine, config), DCP: Dcp(engine), DEEPSPEED: DeepSpeed(engine)}
    state = torch.tensor([float(sum(tensor.nbytes for tensor in pieces(engine).values()))], dtype=torch.float64)
    dist.all_reduce(state)
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in rivals}
    stored: dict[str, int] = {}
    hashing = []

    def note(name: str, what: str, seconds: float) -> None:
        taken[name].setdefault(what, []).append(seconds)

    names = list(rivals)
    for turn in range(-1, rounds):
        shift = max(turn, 0) % len(names)
        for name in names[shift:] + names[:shift]:
            rival = rivals[name]
            with empty(scratch) as folder:
                if turn < 0:
                    check(rival, name, folder)
                    stored[name] = folder_bytes(folder)
                    continue
                saved, _ = clocked(rival.save, folder)
                synced, _ = clocked(sync_files, folder)
                note(name, "save", saved)
                note(name, "save_to_disk", saved + synced)
                note(name, "load", clocked(rival.load, folder)[0])
            with empty(scratch) as folder:
                stall, rest = clocked(rival.begin, folder)
                if rest is not None:
                    note(name, "stall", stall)
                    rest()
        if turn >= 0:
            hashing.append(clocked(hash_alone, engine)[0])
    engine.close()
    return {
        "pattern": pattern,
        "zero_stage": stage,
        "ranks": RANKS,
        "size": asdict(size),
        "state_bytes": int(state),
        "hash": summary(hashing),
        "rivals": {
            name: {"stored_bytes": stored[name]} | {what: summary(all_) for what, all_ in taken[name].items()}
            for name in rivals
        },
        "ratios": {
            name: {
                what: summary([ours / other for ours, other in zip(taken[OURS][what], taken[name][what], strict=True)])
                for what in taken[name]
            }
            for name in (DCP, DEEPSPEED)
        },
    }


def summary(numbers: list[float]) -> dict[str, float]:
    """The median with quartiles."""
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive") if len(numbers) > 1 else numbers * 3
    return {"rounds": len(numbers), "median": middle, "q1": low, "q3": high}


@contextmanager
def empty(scratch: Path) -> Iterator[Path]:
    """A folder that all ranks see, made before and removed after the block; always the same."""
    folder = scratch / "state"
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    yield folder
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    dist.barrier()


def measure(size: Size, stages: list[int], rounds: int, folder: Path | None) -> list[dict[str, Any]]:
    """Rows of all states, measured on `RANKS` processes that are started for it.

    Args:
        size: the model.
        stages: ZeRO stages.
        rounds: how often each rival saves and loads.
        folder: where checkpoints are written and removed again; None: the system's temporary folder.

    Raises:
        RuntimeError: if a rank fails; its errors are in the text.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=folder) as name:
        scratch = Path(name)
        for stage in stages:
            for pattern in PATTERNS:
                # Each in processes of its own: what one has left in memory is not the next one's.
                request = {"size": asdict(size), "pattern": pattern, "stage": stage, "rounds": rounds}
                (scratch / "request.json").write_text(json.dumps(request))
                ranks.run([sys.executable, __file__, str(scratch)], RANKS, scratch, TIMEOUT)
                rows.append(json.loads((scratch / "row.json").read_text()))
    return rows


def _main(scratch: Path) -> None:
    """The life of a rank."""
    request = json.loads((scratch / "request.json").read_text())
    here = environment.discover()
    environment.start(here, threads=1)
    row = measure_state(Size(**request["size"]), request["pattern"], request["stage"], request["rounds"], scratch)
    if here.is_first:
        (scratch / "row.json").write_text(json.dumps(row))
    environment.stop()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
