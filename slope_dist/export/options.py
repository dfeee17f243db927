"""How a model is converted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slope_dist.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By the names that a run's config has for them."""


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


_FORMS_OF = {"merge_adapters": "hf", "pad_adapters": "hf", "prune_adapters": "slope"}
"""The form that an option has a meaning for."""


def check_options(form: str, options: Options) -> None:
    """Refuse what has no meaning for a form.

    Raises:
        UserError: naming the option and the form it is for.
    """
    for option, only in _FORMS_OF.items():
        if getattr(options, option) and form != only:
            raise UserError(f"--{option.replace('_', '-')} is for --to {only}, not for --to {form}")
    if options.merge_adapters and options.pad_adapters:
        raise UserError("--merge-adapters leaves no adapters to pad; give one of the two")
