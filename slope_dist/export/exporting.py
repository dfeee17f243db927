"""One command's work: a model at rest written in another form, whole or not at all, and read back to prove it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from slope_dist.errors import UserError
from slope_dist.export.compressed import CompressedExport
from slope_dist.export.huggingface import HuggingFaceExport
from slope_dist.export.opening import open_model
from slope_dist.export.options import Options, check_options
from slope_dist.export.proof import check_same
from slope_dist.export.slope import SlopeExport
from slope_dist.export.stored import StoredModel
from slope_dist.export.target import new_folder
from slope_dist.transfer import Transfer

FORMS = ("hf", "compressed", "slope")


class Export(Protocol):
    """A form about to be written; making one refuses, before anything is written, what the form cannot hold.

    Attributes:
        bytes: about what it takes on the disk.
    """

    bytes: int

    def write(self, folder: Path, transfer: Transfer) -> list[str]:
        """Write everything into `folder`, which is empty, and return lines that the user should know."""


def export_of(stored: StoredModel, form: str, options: Options) -> Export:
    """The `form` of a model.

    Raises:
        UserError: if it cannot be had, or an option has no meaning for it.
    """
    check_options(form, options)
    if form == "hf":
        return HuggingFaceExport(stored, options)
    if form == "compressed":
        return CompressedExport(stored, options)
    return SlopeExport(stored, options)


def convert(
    stored: StoredModel, form: str, target: Path, options: Options, transfer: Transfer, proving: Transfer
) -> list[str]:
    """Write a model in another form as the new folder `target`, after it was read back and found to be the same.

    Args:
        stored: the model.
        form: of `FORMS`.
        target: must not exist.
        options: how to write.
        transfer: told of the bytes that are written.
        proving: told of the bytes that are read back.

    Returns:
        lines that the user should know.

    Raises:
        UserError: if the model cannot have this form, there is no room, something is at `target`, or that is in the
            folder of the model; nothing is left.
        WrongExportError: if what was written reads back as something else; nothing is left.
    """
    source = Path(os.path.realpath(stored.origin.path))
    if source in Path(os.path.realpath(target)).parents:
        # A checkpoint with one more thing in it would never load again.
        raise UserError(f"{target} is in the folder of the model, {source}; name another --output")
    export = export_of(stored, form, options)
    with new_folder(target, export.bytes) as folder:
        transfer.begin(export.bytes)
        lines = export.write(folder, transfer)
        check_same(stored, open_model(folder), options, proving)
    return lines
