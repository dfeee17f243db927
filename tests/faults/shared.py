"""What trials share: one good run of two ranks, its checkpoints, and their copies to spoil."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from slope_dist.checkpoint import Checkpoint
from slope_dist.checkpoint.format import MANIFEST, folder_name
from tests.distributed import run_ranks
from tests.runs import small_corpus, train, write_config

PREVIOUS_STEP, STEP = 4, 6
PREVIOUS, NEWEST = folder_name(PREVIOUS_STEP), folder_name(STEP)

# 2:4 weights in bf16 with fp32 masters, adapters on since step 4, column masks that are held over four steps; two
# tensor ranks, each of which writes both of its files. Two steps are left to train after the newest checkpoint here.
CHANGES: dict[str, Any] = {
    "model__num_layers": 1,
    "precision": "bf16",
    "sparsity__column_mask_interval": 4,
    "training__steps": 8,
    "adapters__fraction": 5 / 8,
    "checkpoint__interval": 2,
    "checkpoint__keep": 3,
    "evaluation__samples": 2,
}


class GoodRun:
    """A run whose two newest checkpoints are those of steps 4 and 6; made once in the folder of what trials share.

    Attributes:
        corpus: its corpus.
        checkpoints: its folder of checkpoints; nothing in it is ever written to.
        files: the bytes of every file of the newest, by name, the manifest last.
    """

    def __init__(self, shared: Path) -> None:
        self.corpus = small_corpus(shared)
        run = shared / "run"
        if not run.exists():
            # One cut short by Ctrl-C is made again from nothing. The config holds this path, so it is always the same.
            made = shared / "run.partial"
            shutil.rmtree(made, ignore_errors=True)
            run_ranks(train, 2, str(write_config(made, self.corpus, **CHANGES, parallel__tensor=2)))
            shutil.rmtree(made / "run" / "checkpoints" / folder_name(8))
            made.rename(run)
        self.checkpoints = run / "run" / "checkpoints"
        self.files = files_of(self.checkpoints / NEWEST)
        for name in (PREVIOUS, NEWEST):
            checkpoint = Checkpoint.open(self.checkpoints / name)
            assert checkpoint.scalars["adapters"] and len(checkpoint.manifest.files) == 4
            assert any(key.startswith("metadata/") for key in checkpoint.manifest.tensors)

    def copy_into(self, room: Path) -> Path:
        """Both checkpoints in `room`, to be spoilt with `put` alone: they are links. Returns their folder."""
        checkpoints = room / "checkpoints"
        checkpoints.mkdir()
        for name in (PREVIOUS, NEWEST):
            link_files(self.checkpoints / name, checkpoints / name)
        (checkpoints / "latest").write_text(f"{NEWEST}\n")
        return checkpoints


def files_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a checkpoint, the manifest last."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    return {name: (folder / name).read_bytes() for name in [*names, MANIFEST]}


def link_files(source: Path, target: Path) -> None:
    """A folder with the same files, at no cost of time or room."""
    target.mkdir()
    for path in source.iterdir():
        os.link(path, target / path.name)


def put(path: Path, data: bytes) -> None:
    """Other bytes in place of a file, which may be a link to a good one: that stays as it is."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
