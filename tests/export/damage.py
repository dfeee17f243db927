"""Folders of converted models changed by hand, and what their readers must say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from slope_dist.errors import UserError
from slope_dist.export.huggingface_model import HuggingFaceModel
from slope_dist.export.opening import open_model
from slope_dist.inference import InferenceModel

WEIGHTS = "model.safetensors"
ADAPTER = "adapter/adapter_model.safetensors"


def refused(folder: Path, expected: str, act: Callable[[HuggingFaceModel], object] = lambda model: None) -> None:
    """Opening, or `act`, ends in one line that has this in it."""
    with pytest.raises(UserError) as caught:
        act(HuggingFaceModel(folder))
    assert expected in str(caught.value), str(caught.value)
    assert str(caught.value).isprintable()
    assert str(folder) in str(caught.value)


def refusal(folder: Path) -> str:
    """The one line with which a model is refused: when it is opened, or when all of it is read."""
    with pytest.raises(UserError) as caught:
        InferenceModel(open_model(folder))
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 600
    return text


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object], metadata: dict[str, str] | None = None) -> None:
    """Change a file of tensors; its header keeps nothing but `metadata`."""
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, metadata)


def spoilt(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    """A change of one tensor, for `rewrite`."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name])

    return spoil
