"""Whether a checkpoint's numbers can be a run's state: what the format does not say of the bytes it carries."""

from __future__ import annotations

from torch import Tensor

from slope_dist.checkpoint.format import DTYPES, CheckpointError
from slope_dist.checkpoint.reader import Checkpoint
from slope_dist.checkpoint.stored_layers import StoredLayer, byte_tables, stored_layers
from slope_dist.checkpoint.streaming import TensorStream
from slope_dist.transfer import Transfer


def check_state(checkpoint: Checkpoint, transfer: Transfer | None = None) -> None:
    """Read all of a checkpoint and refuse what no run can have saved.

    Every layer's tensors fit together in shape; metadata is what `codec.pack` makes under the pattern of the stored
    config; a column mask names kept entries only; all other state is finite, and second moments are not negative.

    Raises:
        CheckpointError: at the first thing that is not so, naming the tensor and where in it.
    """
    tensors = checkpoint.manifest.tensors
    for key, tensor in tensors.items():
        is_metadata = key.startswith("metadata/")
        if is_metadata != (tensor.dtype == "U8"):
            expected = "U8" if is_metadata else "floating point"
            raise CheckpointError(f"{checkpoint.path}: {key}: expected {expected}, found {tensor.dtype}")
    layers = stored_layers(checkpoint.manifest)
    for layer in layers:
        if layer.problem is not None:
            raise CheckpointError(f"{checkpoint.path}: {layer.problem}")
    stream = TensorStream(checkpoint, transfer)
    stream.begin(tensors)
    for layer in layers:
        _check_metadata(checkpoint, stream, layer)
    for key, tensor in tensors.items():
        if DTYPES[tensor.dtype].is_floating_point:
            for start, chunk in stream.chunks(key):
                _require(checkpoint, key, start, chunk, chunk.isfinite(), "finite numbers")
                if key.startswith("exp_avg_sq/"):
                    _require(checkpoint, key, start, chunk, chunk >= 0, "means of squares")


def _check_metadata(checkpoint: Checkpoint, stream: TensorStream, layer: StoredLayer) -> None:
    if layer.indices is None or layer.pattern is None:
        return
    valid, kept = byte_tables(layer.pattern)
    masks = stream.chunks(layer.column_mask) if layer.column_mask is not None else None
    for start, chunk in stream.chunks(layer.indices):
        entries = chunk.int()
        _require(checkpoint, layer.indices, start, chunk, valid[entries], f"bytes of a {layer.pattern} pattern")
        if masks is not None and layer.column_mask is not None:
            _, mask = next(masks)
            _require(checkpoint, layer.column_mask, start, mask, (mask & ~kept[entries]) == 0, "kept entries only")


def _require(checkpoint: Checkpoint, key: str, start: int, chunk: Tensor, good: Tensor, expected: str) -> None:
    """Raise unless all elements are good, with the first that is not and its place in the tensor."""
    if bool(good.all()):
        return
    first = int((~good).nonzero()[0])
    position, index = start + first, []
    for size in reversed(checkpoint.manifest.tensors[key].shape):
        position, at = divmod(position, size)
        index.append(at)
    raise CheckpointError(
        f"{checkpoint.path}: {key}: expected {expected}, found {chunk[first].item()} at {index[::-1]}"
    )
