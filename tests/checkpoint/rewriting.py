"""Checkpoints of small real runs, and copies of them with something changed; read by hand, not by the product."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slope_dist.checkpoint import Checkpoint, save
from slope_dist.checkpoint.format import DTYPES
from slope_dist.checkpoint.inspection import open_folder
from slope_dist.parallel.fragments import Fragment, whole
from tests.distributed import run_ranks
from tests.runs import small_corpus, train, write_config

STEP = 2
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "data": (2, {"parallel__zero_stage": 1}),
    "tensor": (2, {"parallel__tensor": 2, "adapters__rank": 0}),
    "mask": (1, {"sparsity__column_mask_interval": 4}),
    "bf16": (2, {"precision": "bf16", "sparsity__pattern": "4:8", "parallel__zero_stage": 3}),
    "eighth": (1, {"sparsity__pattern": "2:8"}),
    "half": (1, {"sparsity__pattern": "1:2"}),
    "dense": (1, {"sparsity__pattern": "dense"}),
}
"""Ranks and config of each run."""


def make_run(base: Path, name: str) -> Path:
    """The folder of a run of `STEP` steps; made at the first call."""
    ranks, changes = RUNS[name]
    folder = base / "inspected" / name
    if not (folder / "run").exists():
        changes = {"training__steps": STEP, "training__warmup_steps": 1, "adapters__fraction": 0.5} | changes
        run_ranks(train, ranks, str(write_config(folder, small_corpus(base), **changes)))
    return folder / "run"


def folder_of(base: Path, name: str) -> Path:
    """The folder of the last checkpoint of a run."""
    return make_run(base, name) / "checkpoints" / f"step-{STEP:08d}"


def opened(folder: Path) -> Checkpoint:
    """A checkpoint as the tools open it."""
    return open_folder(folder).checkpoint


def raw_bytes(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and all bytes of every logical tensor, put together from the files by docs/checkpoint-format.md."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    result = {}
    for key, tensor in manifest["tensors"].items():
        shape = tensor["shape"]
        places = np.arange(prod(shape)).reshape(shape)
        elements = np.zeros(prod(shape), dtype=f"V{DTYPES[tensor['dtype']].itemsize}")
        for part in tensor["fragments"]:
            data = (folder / part["file"]).read_bytes()
            begin = 8 + int.from_bytes(data[:8], "little")
            low, high = json.loads(data[8:begin])[part["key"]]["data_offsets"]
            rectangle = places[tuple(slice(*side) for side in part["rectangle"])].reshape(-1)
            elements[rectangle[part["start"] : part["stop"]]] = np.frombuffer(
                data[begin + low : begin + high], dtype=elements.dtype
            )
        result[key] = (tensor["dtype"], shape, elements.tobytes())
    return result


def raw_tensors(folder: Path) -> dict[str, Tensor]:
    """The same as tensors."""
    return {
        key: torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).view(shape)
        for key, (dtype, shape, data) in raw_bytes(folder).items()
    }


Change = Callable[[dict[str, Tensor], dict[str, Any]], object]


def rewrite(source: Path, checkpoints: Path, change: Change = lambda tensors, content: None) -> Path:
    """A checkpoint in `checkpoints` with the state of another, changed, in other fragments.

    Args:
        source: folder of the other.
        checkpoints: where the new one goes, as step `STEP`.
        change: called with the tensors by key and with scalars, identity and config by name, to change them in place.

    Returns:
        The folder of the new one.
    """
    opened = Checkpoint.open(source)
    tensors = raw_tensors(source)
    content = {name: json.loads(json.dumps(getattr(opened, name))) for name in ("scalars", "identity", "config")}
    change(tensors, content)
    save(checkpoints, STEP, _fragments(tensors), **content)
    return checkpoints / f"step-{STEP:08d}"


def _fragments(tensors: dict[str, Tensor]) -> Iterator[Fragment]:
    for key, tensor in tensors.items():
        kind, name = key.split("/")
        shape = tuple(tensor.shape)
        if not shape:
            yield Fragment(name, kind, shape, (), 0, 1, tensor)  # type: ignore[arg-type]
            continue
        # The last dimension in two, and the second part in two flat ranges: a layout that nothing else here has.
        for low, high in ((0, shape[-1] // 3), (shape[-1] // 3, shape[-1])):
            piece = tensor[..., low:high].reshape(-1)
            rectangle = (*whole(shape[:-1]), (low, high))
            for start, stop in ((0, len(piece) // 2), (len(piece) // 2, len(piece))):
                if start < stop:
                    yield Fragment(name, kind, shape, rectangle, start, stop, piece[start:stop])  # type: ignore[arg-type]
