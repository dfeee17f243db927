"""Reading checkpoints: nothing unchecked is loaded, and whatever layout wrote, any layout reads.

Whether the bytes of 2:4 metadata name two ascending positions in every group is not the format's business: it knows
tensors, not patterns. Who loads metadata into a sparse weight checks it with `slope_dist.sparse.codec.check`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slope_dist.checkpoint.format import (
    DTYPES,
    LEFTOVER_NAME,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    CheckpointError,
    Manifest,
    StoredFragment,
    decode,
    step_of,
)
from slope_dist.checkpoint.regions import boxes, describe, flat_bounds, intersect, view_of_box
from slope_dist.files import read_bounded
from slope_dist.parallel.collectives import all_gather_json, broadcast_json, rank, world_size
from slope_dist.parallel.fragments import Kind, Rectangle, rectangle_size
from slope_dist.transfer import Transfer

_CHUNK_BYTES = 4 * 2**20

Stamp = tuple[int, int, int]
"""Size, time of change and inode of a file."""


class Checkpoint:
    """A checkpoint on disk, as a `StateSource`.

    Attributes:
        path: its folder.
        manifest: everything it says of itself.
        step: optimizer steps taken before it was saved.
        scalars: what the run said of its state beside the tensors.
        identity: what must be the same in a run that resumes it.
        config: the resolved config of the run that wrote it.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.step = manifest.step
        self.scalars: Mapping[str, Any] = manifest.scalars
        self.identity: Mapping[str, Any] = manifest.identity
        self.config: Mapping[str, Any] = manifest.config
        self._stamps: dict[str, Stamp] = {}
        self._handles: dict[str, safe_open] = {}
        self._headers: dict[str, dict[str, tuple[str, list[int]]]] = {file: {} for file in manifest.files}
        for tensor in manifest.tensors.values():
            for part in tensor.fragments:
                self._headers[part.file][part.key] = (tensor.dtype, [part.stop - part.start])

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> Checkpoint:
        """Check a checkpoint and open it.

        Args:
            path: its folder.
            verify: also hash every file and compare every file's header. Without, the manifest is checked in full,
                the files by name, type and size, and a header when the first range of its file is read.

        Raises:
            CheckpointError: at the first thing that is not as the manifest says.
        """
        try:
            checkpoint = cls(path, _read_manifest(path))
            checkpoint._stamps = check_listing(path, checkpoint.sizes)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        if verify:
            checkpoint.verify(checkpoint.manifest.files)
        return checkpoint

    def verify(self, files: Collection[str], transfer: Transfer | None = None) -> None:
        """Hash these of the manifest's files, each once, and compare their headers with the manifest.

        Args:
            files: their names.
            transfer: told of the bytes that are read.

        Raises:
            CheckpointError: naming the file, what was expected and what was found.
        """
        transfer = transfer or Transfer()
        transfer.begin(sum(self.manifest.files[name].bytes for name in files))
        for name in files:
            expected = self.manifest.files[name].sha256
            try:
                found = sha256_of(self.path / name, transfer)
            except OSError as error:
                raise CheckpointError(f"{self.path}: {name}: cannot be read: {error}") from error
            if found != expected:
                raise CheckpointError(f"{self.path}: {name}: expected sha256 {expected}, found {found}")
            self._open_file(name)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each of the manifest's files."""
        return {name: file.bytes for name, file in self.manifest.files.items()}

    def has(self, name: str, kind: Kind) -> bool:
        """Whether this state is there; if so, all of it is."""
        return f"{kind}/{name}" in self.manifest.tensors

    def read(self, name: str, kind: Kind, rectangle: Rectangle, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of `rectangle` in row-major order, on the CPU, 1-D, in the dtype they were stored in.

        Files are mapped into memory and only the pages that hold the wanted elements are read; the extra memory is
        the returned tensor. The result owns its memory, and holds nothing of files that have changed since they were
        opened: each file's size, time of change and inode are looked at before and after its elements are copied.

        Raises:
            KeyError: if this state is not there, or the range does not lie inside it.
            CheckpointError: if a file does not hold what the manifest says, has changed or is gone.
        """
        tensor = self.manifest.tensors.get(f"{kind}/{name}")
        if tensor is None:
            raise KeyError(f"{self.path} holds no {kind} of {name}")
        inside = len(rectangle) == len(tensor.shape) and all(
            0 <= low <= high <= size for (low, high), size in zip(rectangle, tensor.shape, strict=True)
        )
        if not inside or not 0 <= start <= stop <= rectangle_size(rectangle):
            raise KeyError(
                f"elements [{start}, {stop}) of {describe(rectangle)} do not lie inside {kind} {name}, "
                f"whose shape in {self.path} is {list(tensor.shape)}"
            )
        result = torch.empty(stop - start, dtype=DTYPES[tensor.dtype])
        wanted = list(boxes(rectangle, start, stop))
        filled = 0
        touched = set()
        for part in tensor.fragments:
            if part.rectangle == rectangle:
                # The writer's own layout: a run of elements, and no need to look at the many other pieces closely.
                low, high = max(start, part.start), min(stop, part.stop)
                if low < high:
                    result[low - start : high - start] = self._slice(part, low, high)
                    filled += high - low
                    touched.add(part.file)
                continue
            if intersect(part.rectangle, rectangle) is None:
                continue
            for stored_box in boxes(part.rectangle, part.start, part.stop):
                for wanted_box in wanted:
                    box = intersect(stored_box, wanted_box)
                    if box is not None:
                        first, last = flat_bounds(part.rectangle, box)
                        source = view_of_box(self._slice(part, first, last), first, part.rectangle, box)
                        view_of_box(result, start, rectangle, box).copy_(source)
                        filled += rectangle_size(box)
                        touched.add(part.file)
        for file in touched:
            self._check_unchanged(file)
        assert filled == stop - start, "the fragments tile the tensor: checked when the checkpoint was opened"
        return result

    def _slice(self, part: StoredFragment, first: int, last: int) -> Tensor:
        """Elements [first, last) of the fragment's rectangle, all of them its own: a 1-D view of the mapped file."""
        # To touch a page that is no longer in the file would end the process.
        self._check_unchanged(part.file)
        view: Tensor = self._open_file(part.file).get_slice(part.key)[first - part.start : last - part.start]
        return view

    def _open_file(self, name: str) -> safe_open:
        """The file, mapped into memory; its header is compared with the manifest when it is first asked for."""
        if name not in self._handles:
            expected = self._headers[name]
            try:
                handle = safe_open(self.path / name, framework="pt")
                slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118  (not a mapping)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.path}: {name}: expected safetensors, found: {error}") from error
            for key in sorted(expected.keys() | slices.keys()):
                found = (slices[key].get_dtype(), slices[key].get_shape()) if key in slices else None
                if found != expected.get(key):
                    raise CheckpointError(
                        f"{self.path}: {name}: {key!r}: expected {_header_entry(expected.get(key))}, "
                        f"found {_header_entry(found)}"
                    )
            self._handles[name] = handle
        return self._handles[name]

    def _check_unchanged(self, name: str) -> None:
        """Refuse a file that is not as it was when the checkpoint was opened, before anything of it was hashed."""
        try:
            # Asked twice a read; Path's own joining would take longer than the answer.
            stamp = stamp_of(os.lstat(f"{self.path}/{name}"))
        except OSError as error:
            raise CheckpointError(f"{self.path}: {name}: cannot be read: {error}") from error
        if stamp != self._stamps[name]:
            raise CheckpointError(
                f"{self.path}: {name}: expected it to stay as it was when it was opened, found it changed"
            )


class Search(NamedTuple):
    """What a look for the newest checkpoint found.

    Attributes:
        checkpoint: the newest that verifies; None where none does.
        damaged: one line for each newer one, saying why it was passed over.
        leftovers: one line for each folder that an interrupted save or removal left behind.
    """

    checkpoint: Checkpoint | None
    damaged: list[str]
    leftovers: list[str]

    @property
    def skipped(self) -> list[str]:
        """All lines, for a log."""
        return [*self.leftovers, *self.damaged]


def find_newest(checkpoints: Path, transfer: Transfer | None = None) -> Search:
    """The newest checkpoint that verifies, looked for by this process alone.

    Args:
        checkpoints: the folder of all checkpoints of a run; it need not exist.
        transfer: told of the bytes that are hashed.

    Raises:
        CheckpointError: if the folder cannot be read.
    """
    names, leftovers = _listing(checkpoints)
    return Search(*_search(checkpoints, names, 0, 1, lambda problem: [problem], transfer), leftovers)


def find_newest_on_all_ranks(checkpoints: Path, transfer: Transfer | None = None) -> Search:
    """As `find_newest`, with the same answer on every rank: a collective in which all share the hashing.

    Args:
        checkpoints: see `find_newest`.
        transfer: told of the bytes that this rank reads.

    Raises:
        CheckpointError: on every rank, if rank 0 cannot read the folder.
    """
    names: list[str] = []
    leftovers: list[str] = []
    error, cause = None, None
    if rank() == 0:
        try:
            names, leftovers = _listing(checkpoints)
        except CheckpointError as caught:
            error, cause = str(caught), caught.__cause__
    names, leftovers, error = broadcast_json([names, leftovers, error])
    if error is not None:
        raise CheckpointError(error) from cause
    return Search(*_search(checkpoints, names, rank(), world_size(), all_gather_json, transfer), leftovers)


def _listing(checkpoints: Path) -> tuple[list[str], list[str]]:
    """Names of the checkpoints' folders, the newest first, and one line for each leftover."""
    try:
        names = os.listdir(checkpoints)
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise CheckpointError(f"{checkpoints}: cannot be read: {error}") from error
    steps = {name: step for name in names if (step := step_of(name)) is not None}
    leftovers = sorted(name for name in names if LEFTOVER_NAME.fullmatch(name))
    return sorted(steps, key=lambda name: -steps[name]), [
        f"{checkpoints / name}: left by an interrupted save or removal, ignored" for name in leftovers
    ]


def _search(
    checkpoints: Path,
    names: list[str],
    here: int,
    ranks: int,
    gather: Callable[[str | None], list[str | None]],
    transfer: Transfer | None = None,
) -> tuple[Checkpoint | None, list[str]]:
    """Verify one folder after the other, this rank's share of each one's files, until `gather` returns no problem."""
    damaged: list[str] = []
    for name in names:
        checkpoint, problem = None, None
        try:
            checkpoint = Checkpoint.open(checkpoints / name, verify=False)
            checkpoint.verify(_share(checkpoint.manifest.files, here, ranks), transfer)
        except CheckpointError as error:
            problem = str(error)
        first = next((found for found in gather(problem) if found is not None), None)
        if first is None:
            return checkpoint, damaged
        damaged.append(first)
    return None, damaged


def _share(files: Collection[str], here: int, ranks: int) -> list[str]:
    """The files that rank `here` of `ranks` hashes: those of its part of the writers, both sorts.

    Ranks write equal parts of the state, but the files of the optimizer are six times as large as those of the
    weights. Where as many read as wrote, a rank hashes what it will load, and finds it still in memory then.
    """
    writers = sorted({name.partition(".")[0] for name in files})
    own = {writer for at, writer in enumerate(writers) if at * ranks // len(writers) == here}
    return sorted(name for name in files if name.partition(".")[0] in own)


def _read_manifest(path: Path) -> Manifest:
    """The folder's manifest, checked by itself and against the folder's name."""
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise CheckpointError(f"{path}: expected a folder, found a file or a link")
    if not os.path.lexists(path / MANIFEST):
        raise CheckpointError(f"{path}: {MANIFEST}: expected a file, found none")
    _regular_file(path, MANIFEST)
    try:
        manifest = decode(read_bounded(path / MANIFEST, MAX_MANIFEST_BYTES))
    except ValueError as error:
        raise CheckpointError(f"{path}: {MANIFEST}: {error}") from error
    step = step_of(path.name)
    if step is not None and manifest.step != step:
        raise CheckpointError(f"{path}: {MANIFEST}: expected step {step}, found step {manifest.step}")
    return manifest


def check_listing(path: Path, sizes: Mapping[str, int]) -> dict[str, Stamp]:
    """Refuse a checkpoint's folder with other files beside its manifest than these, with links, and with other sizes.

    Returns:
        The files as they are now.

    Raises:
        CheckpointError: at the first of them.
        OSError: if the folder cannot be read.
    """
    stamps = {}
    found = set(os.listdir(path)) - {MANIFEST}
    for name in sorted(sizes.keys() - found):
        raise CheckpointError(f"{path}: {name}: expected a file, found none")
    for name in sorted(found - sizes.keys()):
        raise CheckpointError(f"{path}: {name!r}: expected only the manifest's files, found this one too")
    for name, size in sizes.items():
        found_file = _regular_file(path, name)
        if found_file.st_size != size:
            raise CheckpointError(f"{path}: {name}: expected {size} bytes, found {found_file.st_size}")
        stamps[name] = stamp_of(found_file)
    return stamps


def _regular_file(folder: Path, name: str) -> os.stat_result:
    found = os.lstat(folder / name)
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{folder}: {name}: expected a plain file, found a link or something else")
    return found


def stamp_of(file: os.stat_result) -> Stamp:
    """What tells whether a file is still the one it was."""
    return file.st_size, file.st_mtime_ns, file.st_ino


def sha256_of(path: Path, transfer: Transfer) -> str:
    """Of a file's bytes, in hex; `OSError` if it cannot be read."""
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(_CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(chunk):
            digest.update(chunk[:size])
            transfer.add(size)
    return digest.hexdigest()


def _header_entry(entry: tuple[str, list[int]] | None) -> str:
    return f"{entry[0]} {entry[1]}" if entry is not None else "nothing"
