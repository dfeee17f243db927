"""What a checkpoint holds: layer by layer, measured from its bytes, and its hashes independent of any layout."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from slope_dist.checkpoint.format import DTYPES, FILE_NAME, MANIFEST, CheckpointError, StoredTensor, step_of
from slope_dist.checkpoint.reader import Checkpoint, find_newest
from slope_dist.checkpoint.stored_layers import OPTIMIZER_KINDS, StoredLayer, byte_tables, stored_layers
from slope_dist.checkpoint.streaming import TensorStream, num_bytes, squared_norm
from slope_dist.errors import UserError
from slope_dist.sparse import codec
from slope_dist.transfer import Transfer


class Opened(NamedTuple):
    """A checkpoint to look at.

    Attributes:
        checkpoint: it; its manifest holds.
        hashed: whether its files were hashed already.
        skipped: one line for each newer folder that was passed over, and for each leftover of an interrupted save.
    """

    checkpoint: Checkpoint
    hashed: bool
    skipped: list[str]


def open_folder(path: Path, transfer: Transfer | None = None) -> Opened:
    """Open a checkpoint by its own folder, or the newest that verifies of a run folder or its checkpoints folder.

    Args:
        path: the folder.
        transfer: told of the bytes that are hashed, where that is done.

    Raises:
        UserError: if there is no such folder, or no checkpoint in it.
        CheckpointError: if the checkpoint, or each one of the run, is damaged.
    """
    try:
        path = path.resolve(strict=True)
        names = set(os.listdir(path))
    except (OSError, RuntimeError, ValueError) as error:
        # RuntimeError: links in a circle; ValueError: a NUL in the name.
        raise UserError(f"{path} cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    refuse_corpus(path, names)
    if MANIFEST in names or step_of(path.name) is not None:
        return Opened(Checkpoint.open(path, verify=False), False, [])
    folder = path / "checkpoints" if "checkpoints" in names else path
    search = find_newest(folder, transfer)
    if search.checkpoint is None:
        if search.damaged:
            raise CheckpointError(f"{folder}: no checkpoint verifies; the newest: {search.damaged[0]}")
        raise UserError(f"{path} is no checkpoint, and holds none; give a step-... folder or the folder of a run")
    return Opened(search.checkpoint, True, search.skipped)


def refuse_corpus(path: Path, names: Collection[str]) -> None:
    """A prepared corpus has a manifest too, which would be called a damaged checkpoint's.

    Raises:
        UserError: the folder holds one.
    """
    if "train.idx" in names:
        raise UserError(f"{path} is a prepared corpus and no model; give a checkpoint or the folder of a run")


def logical_hashes(checkpoint: Checkpoint, transfer: Transfer | None = None) -> dict[str, str]:
    """SHA-256 of every logical tensor, the same whatever layout wrote the checkpoint.

    Hashed are a line that gives dtype and shape as the manifest writes them, such as "BF16 [64,16]", then all elements
    in row-major order, little-endian.

    Returns:
        hex digits by "<kind>/<global name>", sorted by that.

    Raises:
        CheckpointError: if a file does not hold what the manifest says, or changes.
    """
    stream = TensorStream(checkpoint, transfer)
    tensors = checkpoint.manifest.tensors
    stream.begin(tensors)
    hashes = {}
    for key in sorted(tensors):
        shape = ",".join(map(str, tensors[key].shape))
        digest = hashlib.sha256(f"{tensors[key].dtype} [{shape}]\n".encode())
        for _, chunk in stream.chunks(key):
            digest.update(chunk.view(torch.uint8).numpy().data)
        hashes[key] = digest.hexdigest()
    return hashes


def hash_lines(hashes: Mapping[str, str]) -> str:
    """The hashes as `sha256sum` writes them, a line each."""
    return "".join(f"{digest}  {key}\n" for key, digest in hashes.items())


def hash_of_all(hashes: Mapping[str, str]) -> str:
    """One hash over all tensors: the SHA-256 of `hash_lines`."""
    return hashlib.sha256(hash_lines(hashes).encode()).hexdigest()


@dataclass(frozen=True)
class LayerNumbers:
    """What a layer's bytes say.

    Attributes:
        layer: the layer.
        dtype: of its weight, as safetensors calls it.
        entries: of the weight with its pruned ones.
        kept: entries that the metadata names; all of a dense weight; None where the metadata cannot be understood.
        column_kept: entries that the column mask names, where it is state.
        stored_elements: elements of the weight in the files.
        zeros: stored elements that are 0 or -0.
        norm: Euclidean norm of the weight.
    """

    layer: StoredLayer
    dtype: str
    entries: int
    kept: int | None
    column_kept: int | None
    stored_elements: int
    zeros: int
    norm: float


def measure_layers(checkpoint: Checkpoint, transfer: Transfer | None = None) -> list[LayerNumbers]:
    """Read every layer's weight and metadata and measure them; layers without a weight are left out.

    Raises:
        CheckpointError: if a file does not hold what the manifest says, or changes.
    """
    tensors = checkpoint.manifest.tensors
    layers = [layer for layer in stored_layers(checkpoint.manifest) if layer.weight is not None]
    stream = TensorStream(checkpoint, transfer)
    keys = [key for layer in layers for key in (layer.weight, layer.indices, layer.column_mask) if key is not None]
    stream.begin(keys)
    rows = []
    for layer in layers:
        assert layer.weight is not None
        zeros, squares = 0, 0.0
        for _, chunk in stream.chunks(layer.weight):
            zeros += chunk.numel() - int(chunk.count_nonzero())
            squares += squared_norm(chunk)
        entries, stored = prod(layer.shape), prod(tensors[layer.weight].shape)
        kept = stored if layer.indices is None else None
        column_kept = None
        if layer.pattern is not None and layer.indices is not None:
            kept = _count_bits(stream, layer.indices, byte_tables(layer.pattern)[1])
            if layer.column_mask is not None:
                column_kept = _count_bits(stream, layer.column_mask, torch.arange(256, dtype=torch.uint8))
        dtype = tensors[layer.weight].dtype
        rows.append(LayerNumbers(layer, dtype, entries, kept, column_kept, stored, zeros, sqrt(squares)))
    return rows


def _count_bits(stream: TensorStream, key: str, bits_of_byte: Tensor) -> int:
    """Bits in a U8 tensor, each byte read as a table (uint8 [256]) translates it."""
    counts = torch.zeros(256, dtype=torch.int64)
    for _, chunk in stream.chunks(key):
        counts += torch.bincount(chunk, minlength=256)
    return int((counts * codec.unpack_bits(bits_of_byte.view(256, 1)).sum(dim=1)).sum())


@dataclass(frozen=True)
class Totals:
    """Sizes that follow from the manifest alone; elements unless they say bytes.

    "pruned" is about the layers that are stored as N:M; "dense" what the same layers would take if they were not.

    Attributes:
        files: number and bytes of the files, by sort.
        ranks: how many ranks wrote files.
        trained: everything of kind weight.
        pruned_kept: kept entries of pruned weights.
        pruned_entries: those and the pruned ones.
        adapters: of the adapters.
        pruned_bytes: weights and metadata of pruned layers.
        dense_bytes: of them in their own dtype.
        dense_bf16_bytes: of them in bf16.
        pruned_optimizer_bytes: optimizer state of pruned weights.
        dense_optimizer_bytes: of them.
        optimizer_bytes: all optimizer state.
    """

    files: dict[str, tuple[int, int]]
    ranks: int
    trained: int
    pruned_kept: int
    pruned_entries: int
    adapters: int
    pruned_bytes: int
    dense_bytes: int
    dense_bf16_bytes: int
    pruned_optimizer_bytes: int
    dense_optimizer_bytes: int
    optimizer_bytes: int


def count_totals(checkpoint: Checkpoint) -> Totals:
    """Add up a checkpoint; nothing but its manifest is read."""
    manifest = checkpoint.manifest
    tensors = manifest.tensors
    files: dict[str, tuple[int, int]] = {}
    for name, entry in manifest.files.items():
        match = FILE_NAME.fullmatch(name)
        assert match is not None
        number, size = files.get(match[1], (0, 0))
        files[match[1]] = (number + 1, size + entry.bytes)
    sums = dict.fromkeys(("kept", "entries", "bytes", "dense", "optimizer", "dense_optimizer"), 0)
    for layer in stored_layers(manifest):
        if layer.pattern is None or layer.weight is None:
            continue
        kept, entries = prod(tensors[layer.weight].shape), prod(layer.shape)
        sums["kept"] += kept
        sums["entries"] += entries
        sums["bytes"] += sum(num_bytes(tensors[key]) for key in (layer.weight, layer.indices, layer.column_mask) if key)
        sums["dense"] += entries * DTYPES[tensors[layer.weight].dtype].itemsize
        for state in _optimizer_state(tensors, layer.weight):
            sums["optimizer"] += num_bytes(state)
            sums["dense_optimizer"] += entries * DTYPES[state.dtype].itemsize
    trained = {key: prod(tensor.shape) for key, tensor in tensors.items() if key.startswith("weight/")}
    return Totals(
        files=files,
        ranks=len({name.split(".")[0] for name in manifest.files}),
        trained=sum(trained.values()),
        pruned_kept=sums["kept"],
        pruned_entries=sums["entries"],
        adapters=sum(size for key, size in trained.items() if key.endswith((".adapter.down", ".adapter.up"))),
        pruned_bytes=sums["bytes"],
        dense_bytes=sums["dense"],
        dense_bf16_bytes=2 * sums["entries"],
        pruned_optimizer_bytes=sums["optimizer"],
        dense_optimizer_bytes=sums["dense_optimizer"],
        optimizer_bytes=sum(
            num_bytes(tensor) for key, tensor in tensors.items() if key.partition("/")[0] in OPTIMIZER_KINDS
        ),
    )


def _optimizer_state(tensors: Mapping[str, StoredTensor], weight: str) -> list[StoredTensor]:
    name = weight.partition("/")[2]
    return [tensors[key] for kind in OPTIMIZER_KINDS if (key := f"{kind}/{name}") in tensors]
