"""How a model is converted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slope_dist.errors import UserError


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


def check_options(form: str, options: Options) -> None:
    """Refuse what has no meaning for a form.

    Raises:
        UserError: naming the option and the form it is for.
    """
    if (options.merge_adapters or options.pad_adapters) and form != "hf":
        raise UserError(f"--merge-adapters and --pad-adapters are for --to hf, not {form}")
    if options.merge_adapters and options.pad_adapters:
        raise UserError("--merge-adapters leaves no adapters to pad; give one of the two")
    if options.prune_adapters and form != "slope":
        raise UserError(f"--prune-adapters is for --to slope, not {form}")
