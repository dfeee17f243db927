"""One command's work: a model at rest written in another form, whole or not at all, and read back to prove it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from slope_dist.errors import UserError
from slope_dist.export.stored import StoredModel
from slope_dist.transfer import Transfer

FORMS = ("hf", "compressed", "slope")

_FORMS_OF = {"merge_adapters": ("hf",), "pad_adapters": ("hf",), "prune_adapters": ("slope",)}
"""Which forms an option has a meaning for."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to write.

    Attributes:
        dtype: of all numbers; None: as they are stored.
        merge_adapters: add adapters into the weights, which are then dense ("hf").
        pad_adapters: zero rows and columns up to a rank that vLLM accepts ("hf").
        prune_adapters: prune first factors 2:4, so that they can be appended to their weights ("slope").
        tokenizer: write the tokenizer's files too.
    """

    dtype: torch.dtype | None = None
    merge_adapters: bool = False
    pad_adapters: bool = False
    prune_adapters: bool = False
    tokenizer: bool = True


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
    for option, forms in _FORMS_OF.items():
        if getattr(options, option) and form not in forms:
            raise UserError(f"--{option.replace('_', '-')} is for --to {' and '.join(forms)}, not for --to {form}")
    if form == "hf":
        from slope_dist.export.huggingface import HuggingFaceExport

        return HuggingFaceExport(stored, options)
    if form == "compressed":
        from slope_dist.export.compressed import CompressedExport

        return CompressedExport(stored, options)
    from slope_dist.export.slope import SlopeExport

    return SlopeExport(stored, options)
