"""Writing checkpoints: every rank its own files at once, and one rename that makes them a checkpoint.

Until that rename no reader sees anything of a save but a temporary folder it ignores; a save that fails or is killed at
any point leaves every earlier checkpoint as it was.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

import slope_dist
from slope_dist.checkpoint.format import (
    FORMAT_VERSION,
    LATEST,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    CheckpointError,
    check_content,
    dtype_name,
    encode,
    folder_name,
)
from slope_dist.checkpoint.retention import discard, set_aside, sync_folder
from slope_dist.checkpoint.tensor_file import Entry, durable_file, header_of, write_hashed
from slope_dist.parallel.collectives import broadcast_json, gather_json, rank
from slope_dist.parallel.fragments import Fragment
from slope_dist.transfer import Transfer, size_text

Progress = Callable[[str], None]

CHUNK_BYTES = 16 * 2**20
"""Host memory a save needs beside the state itself, which passes through it piece by piece."""

_WEIGHT_KINDS = ("weight", "metadata")


class UnsavableError(CheckpointError):
    """What was to be saved cannot be, whatever becomes of the disk: a defect, or a limit of the format."""


class Saved(NamedTuple):
    """A new checkpoint.

    Attributes:
        path: its folder, `step-00000123`.
        bytes: of all its files.
        sizes: of each but the manifest, on rank 0; empty elsewhere.
    """

    path: Path
    bytes: int
    sizes: dict[str, int]


def save(
    checkpoints: Path,
    step: int,
    fragments: Iterable[Fragment],
    scalars: dict[str, Any],
    identity: dict[str, Any],
    config: dict[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
    transfer: Transfer | None = None,
) -> Saved:
    """Write the checkpoint of a step: a collective over all ranks.

    State is read while it is written, so it must not change before the return. Extra host memory is `CHUNK_BYTES` a
    rank and the manifest; a fragment that has no flat view of its memory is copied on its device while it is written.

    Args:
        checkpoints: the folder of all checkpoints of the run, on a file system that all ranks share; made if missing.
        step: optimizer steps taken.
        fragments: the state this rank holds; those with write=False and empty ones are passed over. Those of all
            ranks together must hold every element of each of their logical tensors exactly once.
        scalars: JSON; what is not a tensor (rank 0's is taken; so with `identity` and `config`).
        identity: JSON; what a run that resumes must have in common with this one.
        config: JSON; the resolved config.
        group: all ranks, for collectives; the default group if None.
        transfer: told of the bytes that this rank writes.
        progress: called at named points, in this order: "weights", "optimizer" (this rank's files of that sort are
            written), "voted" (all ranks have written), and on rank 0 "manifest", "folder" (both written and synced),
            "replaced" (only where a folder of this step stood in the way), "renamed", "latest".

    Returns:
        The new checkpoint. A folder of its name which was there is moved aside, and removed with the next `prune`.

    Raises:
        CheckpointError: on all ranks, if any could not do its part. Earlier checkpoints are untouched, and the new one
            is not there (or, if only the last sync of the folder's name failed, whole but perhaps not durable).
        UnsavableError: the same, where another attempt would fail alike.
    """
    notify = progress or (lambda _: None)
    temporary = checkpoints / broadcast_json(f"{folder_name(step)}.tmp-{uuid4().hex}", group)
    part: dict[str, Any] = {}
    error, cause, in_vain = None, None, False
    # Whatever goes wrong on one rank, the others wait for its vote.
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        part = _write_rank(temporary, fragments, notify, transfer or Transfer())
    except Exception as caught:
        error, cause, in_vain = _in_words(caught), caught, _is_in_vain(caught)
    votes = gather_json([error, in_vain, part], group)
    notify("voted")
    verdict, size = None, 0
    sizes: dict[str, int] = {}
    if votes is not None:
        failed = [(f"rank {index}: {said}", vain) for index, (said, vain, _) in enumerate(votes) if said is not None]
        verdict, in_vain = failed[0] if failed else (None, False)
        if verdict is None:
            content = {"step": step, "scalars": scalars, "identity": identity, "config": config}
            try:
                parts = [written for *_, written in votes]
                size, sizes = _commit(temporary, checkpoints / folder_name(step), content, parts, notify)
            except Exception as caught:
                verdict, cause, in_vain = _in_words(caught), caught, _is_in_vain(caught)
        if verdict is not None:
            discard(temporary)
    verdict, in_vain, size = broadcast_json([verdict, in_vain, size], group)
    if verdict is not None:
        kind = UnsavableError if in_vain else CheckpointError
        raise kind(f"{checkpoints}: step {step} was not saved: {verdict}") from cause
    return Saved(checkpoints / folder_name(step), size, sizes)


def _write_rank(folder: Path, fragments: Iterable[Fragment], notify: Progress, transfer: Transfer) -> dict[str, Any]:
    """Write this rank's files.

    Returns:
        Its part of the manifest: {"files": ..., "tensors": ...}.
    """
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    pieces: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}}
    for fragment in fragments:
        if not fragment.write or fragment.start == fragment.stop:
            continue
        if fragment.tensor.numel() != fragment.stop - fragment.start:
            raise ValueError(
                f"{fragment.kind} {fragment.name}: elements [{fragment.start}, {fragment.stop}) were announced, "
                f"{fragment.tensor.numel()} given"
            )
        sort = "weights" if fragment.kind in _WEIGHT_KINDS else "optimizer"
        name = f"{fragment.kind}/{fragment.name}"
        entry = {"shape": list(fragment.shape), "dtype": dtype_name(fragment.tensor.dtype), "fragments": []}
        stored = tensors.setdefault(name, entry)
        _check_same(name, stored, entry)
        key = f"{name}/{len(stored['fragments'])}"
        stored["fragments"].append(
            {
                "file": _file_name(sort),
                "key": key,
                "rectangle": [list(side) for side in fragment.rectangle],
                "start": fragment.start,
                "stop": fragment.stop,
            }
        )
        pieces[sort][key] = fragment.tensor
    transfer.begin(sum(tensor.nbytes for keyed in pieces.values() for tensor in keyed.values()))
    for sort, keyed in pieces.items():
        if keyed:
            files[_file_name(sort)] = _write_safetensors(folder / _file_name(sort), keyed, transfer)
        notify(sort)
    return {"files": files, "tensors": tensors}


def _file_name(sort: str) -> str:
    return f"rank-{rank():05d}.{sort}.safetensors"


def _write_safetensors(path: Path, tensors: dict[str, Tensor], transfer: Transfer) -> dict[str, Any]:
    """Write 1-D tensors as a safetensors file, hashed on the way, and sync it.

    safetensors' own writer would need all of them on the host at once and a second reading for the hash.

    Returns:
        {"bytes": its size, "sha256": its hash}.
    """
    # The widest elements first keep each tensor aligned to its element size, which memory-mapping readers need.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header = header_of(Entry(key, dtype_name(value.dtype), (value.numel(),), value.nbytes) for key, value in ordered)
    size, sha256 = write_hashed(path, header, _all_bytes(tensor for _, tensor in ordered), transfer)
    return {"bytes": size, "sha256": sha256}


def _all_bytes(tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    """The tensors in order; each part is to be used before the next is asked for."""
    # One buffer for all, even for what is on the CPU: a strided or one-element chunk cannot always be viewed as bytes.
    buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        for chunk in flat.split(CHUNK_BYTES // flat.element_size()):
            data = buffer[: chunk.numel() * chunk.element_size()]
            data.view(chunk.dtype).copy_(chunk)
            yield data.numpy().data


def _commit(
    temporary: Path, final: Path, content: dict[str, Any], parts: list[dict[str, Any]], notify: Progress
) -> tuple[int, dict[str, int]]:
    """Write the manifest of all ranks' files and give the folder its name.

    Returns:
        The bytes of all files, and of each but the manifest.
    """
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for part in parts:
        files.update(part["files"])
        for name, entry in part["tensors"].items():
            stored = tensors.setdefault(name, {**entry, "fragments": []})
            _check_same(name, stored, entry)
            stored["fragments"] += entry["fragments"]
    versions = {
        "slope_dist": slope_dist.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    content = {"format": FORMAT_VERSION, **content, "versions": versions, "files": files, "tensors": tensors}
    # The reader's own checks: a defect that leaves a hole in a tensor must not become a checkpoint.
    check_content(content)
    data = encode(content)
    if len(data) > MAX_MANIFEST_BYTES:
        pieces = sum(len(entry["fragments"]) for entry in tensors.values())
        raise ValueError(
            f"the manifest of {pieces} pieces would take {size_text(len(data))}, and no reader takes more than "
            f"{size_text(MAX_MANIFEST_BYTES)}; let fewer ranks share each tensor: fewer data ranks with more tensor or "
            "pipeline ranks, or a ZeRO stage below 3"
        )
    for name, entry in files.items():
        path = temporary / name
        if not path.exists() or path.stat().st_size != entry["bytes"]:
            raise OSError(f"{path} is not what its rank wrote: is the folder on a file system that all ranks share?")
    with durable_file(temporary / MANIFEST) as file:
        file.write(data)
    notify("manifest")
    sync_folder(temporary)
    notify("folder")
    in_the_way = set_aside(final) if os.path.lexists(final) else None
    if in_the_way is not None:
        notify("replaced")
    try:
        os.rename(temporary, final)
    except OSError:
        if in_the_way is not None:
            os.rename(in_the_way, final)
        raise
    notify("renamed")
    sync_folder(final.parent)
    sync_folder(final.parent.parent)
    _point_latest(final)
    notify("latest")
    sizes = {name: int(entry["bytes"]) for name, entry in files.items()}
    return len(data) + sum(sizes.values()), sizes


def _point_latest(final: Path) -> None:
    # A hint for people and tools, which no resume relies on: not worth failing a save that is already complete.
    with contextlib.suppress(OSError):
        temporary = final.with_name(f"{LATEST}.tmp")
        temporary.unlink(missing_ok=True)
        with durable_file(temporary) as file:
            file.write(f"{final.name}\n".encode())
        os.rename(temporary, final.with_name(LATEST))


def _check_same(name: str, first: dict[str, Any], second: dict[str, Any]) -> None:
    """Refuse fragments that do not agree on the tensor they are pieces of."""
    for what in ("shape", "dtype"):
        if first[what] != second[what]:
            raise ValueError(f"{name}: one fragment says {what} {first[what]}, another {second[what]}")


def _is_in_vain(error: Exception) -> bool:
    # Not so whatever a disk says: also a full one, a quota or a folder's rights may be put right meanwhile.
    return isinstance(error, ValueError | TypeError)


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"
