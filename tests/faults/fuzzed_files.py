"""Manifests and headers changed at random, most of them sealed again so that the change gets past the hashes.

Whatever comes of it is a refusal, or a checkpoint in which every tensor is what a plain reader makes of the same
bytes: that reader shares no code with ours, and follows docs/checkpoint-format.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slope_dist.checkpoint import Checkpoint, CheckpointError, find_newest
from slope_dist.checkpoint.format import MANIFEST, folder_name
from slope_dist.parallel.fragments import whole
from tests.checkpoint.states import save_state
from tests.distributed import run_ranks
from tests.faults.damage import SEAL_SIZE, entry_of, header_size, safetensors, seal
from tests.faults.mutation import mutate_bytes, mutate_tree, write
from tests.faults.refusal import line_of
from tests.faults.shared import NEWEST, GoodRun, files_of

_STEP = 2
_REAL_EVERY = 40
"""Most trials take a small checkpoint in every dtype: with a real one's many tensors, each takes ten times as long."""

_ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1}
_MOST_DIMENSIONS = 32


def make_small(folder: str) -> None:
    """A checkpoint of few tensors, on the ranks that call this."""
    save_state(Path(folder), _STEP)


class FuzzedFiles:
    """One to three changes of a manifest or of a header."""

    def __init__(self, shared: Path) -> None:
        small = shared / "small"
        if not (small / folder_name(_STEP)).exists():
            run_ranks(make_small, 2, str(small))
        places = {"small": small / folder_name(_STEP), "real": GoodRun(shared).checkpoints / NEWEST}
        self.files = {name: files_of(place) for name, place in places.items()}
        self.places = places

    def __call__(self, index: int, draw: random.Random, room: Path) -> str | None:
        which = "real" if index % _REAL_EVERY == 0 else "small"
        good = self.files[which]
        changed = _changed(good, draw)
        # Under the name of a checkpoint the search can be tried too; plainly in the room is faster.
        searched = index % 4 == 0
        folder = room / self.places[which].name if searched else room
        folder.mkdir(exist_ok=True)
        for name in good:
            if name not in changed:
                os.link(self.places[which] / name, folder / name)
        for name, data in changed.items():
            (folder / name).write_bytes(data)
        try:
            checkpoint = Checkpoint.open(folder)
        except CheckpointError as error:
            if searched and find_newest(room).checkpoint is not None:
                return f"the search takes what opening refuses: {error}"
            problem = line_of(error)
            return problem or (None if str(folder) in str(error) else f"the folder is not named in: {error}")
        return _wrongly_taken(checkpoint)


def _changed(good: dict[str, bytes], draw: random.Random) -> dict[str, bytes]:
    """The files that are other than in `good`, their bytes by name."""
    target = draw.choice(
        ["manifest", "manifest", "manifest", "manifest bytes", "header", "header", "header bytes", "both"]
    )
    if target == "both":
        return _changed_alike(good, draw)
    body = good[MANIFEST][:-SEAL_SIZE]
    if target.startswith("manifest"):
        sealed = draw.random() < 0.95
        for _ in range(draw.randrange(1, 4)):
            if target == "manifest":
                tree = mutate_tree(json.loads(body + b"}"), draw)
                # Without its closing brace, which the seal brings; what is no object any more has none.
                text = write(tree)
                body = text[:-1] if isinstance(tree, dict) else text
                if not isinstance(tree, dict) or any(ord(c) == 1 for c in json.dumps(tree)):
                    break
            else:
                body = mutate_bytes(body, draw)
            if not _is_object(body):
                break
        return {MANIFEST: seal(body) if sealed else body + good[MANIFEST][-SEAL_SIZE:]}
    name = draw.choice([name for name in good if name != MANIFEST])
    data = good[name]
    header, rest = data[8 : header_size(data)], data[header_size(data) :]
    for _ in range(draw.randrange(1, 4)):
        if target == "header":
            tree = mutate_tree(json.loads(header), draw)
            header = write(tree)
            if not _is_object(header[:-1]):
                break
        else:
            header = mutate_bytes(header, draw)
    length = (
        None if draw.random() < 0.9 else draw.choice([len(header) + 8, len(header) // 2, 2**40, draw.getrandbits(64)])
    )
    files = {name: safetensors(header, rest, length)}
    return files | _vouching(good, files) if draw.random() < 0.95 else files


def _changed_alike(good: dict[str, bytes], draw: random.Random) -> dict[str, bytes]:
    """One word of a header, changed to the same other word wherever it stands in headers and manifest."""
    words = [(b'"F16"', b'"BF16"'), (b'"BF16"', b'"F16"'), (b'"F32"', b'"F64"'), (b'"U8"', b'"I8"'), (b"layers", b"..")]
    words += [
        (b"values/0", name)
        for name in (b"", b"values/1", b"\\u0000", b"\\ud800", b"\xff", b"x" * 5000, b"__metadata__")
    ]
    old, new = draw.choice(words)
    files = {}
    for name, data in good.items():
        header = data[8 : header_size(data)]
        if name != MANIFEST and old in header:
            files[name] = safetensors(header.replace(old, new), data[header_size(data) :])
    return files | _vouching({**good, MANIFEST: good[MANIFEST].replace(old, new)}, files)


def _vouching(good: dict[str, bytes], files: dict[str, bytes]) -> dict[str, bytes]:
    """The manifest of `good` for other bytes in these files."""
    text = good[MANIFEST][:-SEAL_SIZE]
    for name, data in files.items():
        before, now = entry_of(good[name]), entry_of(data)
        text = text.replace(_compact(before), _compact(now))
    return {MANIFEST: seal(text)}


def _compact(tree: Any) -> bytes:
    return json.dumps(tree, separators=(",", ":")).encode()


def _is_object(body: bytes) -> bool:
    """Whether a text without its closing brace can still be changed as a tree."""
    try:
        return isinstance(json.loads(body + b"}"), dict)
    except (ValueError, RecursionError):
        return False


def _wrongly_taken(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint that was not refused: a hash, or a tensor that a plain reader reads otherwise."""
    manifest = (checkpoint.path / MANIFEST).read_bytes()
    sealed = b',"sha256":"' + hashlib.sha256(manifest[:-SEAL_SIZE]).hexdigest().encode() + b'"}\n'
    if manifest[-SEAL_SIZE:] != sealed:
        return "a manifest with a wrong seal was taken"
    content = json.loads(manifest)
    for name, entry in content["files"].items():
        if entry != entry_of((checkpoint.path / name).read_bytes()):
            return f"{name} was taken although its hash is another"
    for key, tensor in content["tensors"].items():
        shape = tuple(tensor["shape"])
        if len(shape) > _MOST_DIMENSIONS:
            continue
        kind, _, name = key.partition("/")
        found = checkpoint.read(name, kind, whole(shape), 0, prod(shape))
        if found.view(torch.uint8).numpy().tobytes() != _plainly_read(checkpoint.path, tensor):
            return f"{key} is read otherwise than by a plain reader"
    return None


def _plainly_read(folder: Path, tensor: dict[str, Any]) -> bytes:
    """A tensor's bytes by the format's description alone."""
    shape, size = tensor["shape"], _ELEMENT_BYTES[tensor["dtype"]]
    positions = np.arange(prod(shape)).reshape(shape)
    result = np.zeros((prod(shape), size), np.uint8)
    for piece in tensor["fragments"]:
        data = (folder / piece["file"]).read_bytes()
        begin = header_size(data)
        start, stop = json.loads(data[8:begin])[piece["key"]]["data_offsets"]
        inside = positions[tuple(slice(low, high) for low, high in piece["rectangle"])].reshape(-1)
        elements = np.frombuffer(data[begin + start : begin + stop], np.uint8).reshape(-1, size)
        result[inside[piece["start"] : piece["stop"]]] = elements
    return result.tobytes()
