"""Models to begin small runs from, and what they began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from slope_dist.checkpoint.validation import check_state
from slope_dist.config import Config, load_config
from slope_dist.data.tokenizer import Tokenizer
from slope_dist.export.checkpoint_model import CheckpointModel
from slope_dist.export.exporting import convert
from slope_dist.export.options import Options
from slope_dist.export.stored import LinearForm, StoredModel
from slope_dist.transfer import Transfer
from tests.export.models import MemoryModel, random_stored
from tests.runs import VOCAB_SIZE, newest, write_config


class AsDense(StoredModel):
    """The same model whose files know nothing of patterns."""

    def __init__(self, sparse: StoredModel) -> None:
        self.sparse = sparse
        self.origin, self.model, self.dtype = sparse.origin, sparse.model, sparse.dtype
        self.linears = {name: LinearForm(form.shape, bias=form.bias) for name, form in sparse.linears.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        linear = name.removesuffix(".weight.values")
        found = self.sparse.dense(linear) if linear in self.linears else self.sparse.read(name)
        return found[start:stop].clone()

    def tokenizer(self) -> Tokenizer:
        return self.sparse.tokenizer()


class Altered(StoredModel):
    """A model of which one tensor is another."""

    def __init__(self, model: StoredModel, name: str, tensor: Tensor) -> None:
        self.whole, self.name, self.tensor = model, name, tensor
        self.origin, self.model, self.dtype, self.linears = model.origin, model.model, model.dtype, model.linears

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.tensor[start:stop].clone() if name == self.name else self.whole.read(name, start, stop)

    def tokenizer(self) -> Tokenizer:
        return self.whole.tokenizer()


def model_of(form: str, tokenizer: Tokenizer | None, **how: Any) -> MemoryModel:
    return random_stored(form, vocab_size=VOCAB_SIZE, tokenizer=tokenizer, **how)


def config_for(stored: StoredModel, folder: Path, corpus: Path, **changes: Any) -> Config:
    model = stored.model.model_dump(mode="json") | changes.pop("model", {})
    return load_config(write_config(folder, corpus, model=model, **changes))


def written(stored: StoredModel, form: str, target: Path, **how: bool) -> None:
    convert(stored, form, target, Options(**how), Transfer(), Transfer())


def begun(folder: Path) -> CheckpointModel:
    """The checkpoint of step 0, all of it checked."""
    checkpoint = newest(folder / "run")
    assert checkpoint.step == 0
    check_state(checkpoint)
    return CheckpointModel(folder / "run")
