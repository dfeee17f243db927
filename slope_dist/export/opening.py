"""Whatever form a model's files have, opened as a `StoredModel`."""

from __future__ import annotations

import os
from pathlib import Path

from slope_dist.checkpoint.format import MANIFEST, step_of
from slope_dist.checkpoint.inspection import refuse_corpus
from slope_dist.errors import UserError
from slope_dist.export.checkpoint_model import CheckpointModel
from slope_dist.export.compressed import CompressedModel
from slope_dist.export.huggingface_model import HuggingFaceModel
from slope_dist.export.json_files import CONFIG, SLOPE, read_json
from slope_dist.export.slope import SlopeModel
from slope_dist.export.stored import StoredModel
from slope_dist.transfer import Transfer


def open_model(path: Path, tokenizer: Path | None = None, transfer: Transfer | None = None) -> StoredModel:
    """Open a checkpoint, a run folder (its newest checkpoint that verifies), or a converted model.

    Args:
        path: a folder.
        tokenizer: of the model; None: the one with it, or where its config says.
        transfer: told of the bytes that are hashed.

    Raises:
        UserError: if it is none of these, or damaged.
    """
    form = form_of(path)
    if form == "checkpoint":
        return CheckpointModel(path, tokenizer, transfer)
    if form == "slope":
        return SlopeModel(path, tokenizer, transfer)
    if form == "compressed":
        return CompressedModel(path, tokenizer, transfer)
    return HuggingFaceModel(path, tokenizer, transfer)


def form_of(path: Path) -> str:
    """ "checkpoint", "slope", "compressed" or "hf".

    Raises:
        UserError: if the folder is none of these.
    """
    try:
        names = set(os.listdir(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    refuse_corpus(path, names)
    if MANIFEST in names or "checkpoints" in names:
        return "checkpoint"
    if SLOPE in names:
        return "slope"
    if CONFIG in names:
        return "compressed" if "quantization_config" in read_json(path / CONFIG) else "hf"
    # A folder of checkpoints, or a save that did not end; a converted model may be called like a checkpoint.
    if any(step_of(name) is not None for name in names) or step_of(path.name.partition(".tmp-")[0]) is not None:
        return "checkpoint"
    raise UserError(
        f"{path} holds no model: expected a checkpoint (manifest.json), a run folder (checkpoints/), {SLOPE} or "
        f"{CONFIG} of Hugging Face"
    )
