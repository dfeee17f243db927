"""Folders of Hugging Face's form, written by us and loaded by its own libraries, for the tests of that form."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from slope_dist.export.huggingface import HuggingFaceExport
from slope_dist.export.options import Options
from slope_dist.export.stored import StoredModel
from slope_dist.inference import InferenceModel
from slope_dist.transfer import Transfer
from tests.models.twins import LENGTH, VOCAB

transformers.utils.logging.disable_progress_bar()

TOKENS = (torch.arange(2 * LENGTH).pow(2) % VOCAB).view(2, LENGTH)
EXACT = 1e-5
"""In fp32, of logits whose standard deviation is between one and two."""


def exported(stored: StoredModel, folder: Path, shard_bytes: int = 10**9, **options: Any) -> list[str]:
    """Write into `folder`, which is made; without the tokenizer unless asked for."""
    export = HuggingFaceExport(stored, Options(**({"tokenizer": False} | options)), shard_bytes=shard_bytes)
    folder.mkdir()
    return export.write(folder, Transfer())


def loaded(folder: Path) -> nn.Module:
    """transformers' model of the folder, of which it has all and only the tensors that it wants."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def with_adapter(folder: Path) -> nn.Module:
    """The same with PEFT's adapter on it, of which all and only the tensors that PEFT wants are there."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.PeftModel.from_pretrained(loaded(folder), folder / "adapter")
        # The first load keeps its result to itself.
        result = model.load_adapter(folder / "adapter", adapter_name="again")
    assert not result.missing_keys
    assert not result.unexpected_keys
    return model.eval()


def ours(stored: StoredModel) -> Tensor:
    """Our logits of `TOKENS`, fp32."""
    return InferenceModel(stored).logits(TOKENS).float()


def theirs(model: nn.Module) -> Tensor:
    """Logits of a model of transformers', fp32."""
    with torch.inference_mode():
        return model(TOKENS).logits.float()


def difference(first: Tensor, second: Tensor) -> float:
    """Largest, of all elements."""
    assert first.shape == second.shape
    return float((first - second).abs().max())


def relative(first: Tensor, second: Tensor) -> float:
    """Root of the mean square of the difference, relative to that of the second."""
    assert first.shape == second.shape
    return float((first - second).pow(2).mean().sqrt() / second.pow(2).mean().sqrt())


def roundings(dtype: torch.dtype) -> float:
    """Eight steps of a dtype: what two orders of the same additions may differ by, behind three blocks."""
    return 8 * torch.finfo(dtype).eps
