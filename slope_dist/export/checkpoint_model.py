"""A training checkpoint, of any layout, read as a model at rest."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from slope_dist.checkpoint import Checkpoint, CheckpointError
from slope_dist.checkpoint.format import DTYPES, step_of
from slope_dist.checkpoint.inspection import open_folder
from slope_dist.config import Config
from slope_dist.config.messages import explain
from slope_dist.data.json_tokenizer import CONFIG_FILE
from slope_dist.data.load_tokenizer import FILES, load_tokenizer
from slope_dist.data.tokenizer import Tokenizer
from slope_dist.errors import UserError
from slope_dist.export.stored import Origin, StoredModel, all_finite, forms_of
from slope_dist.output import visible
from slope_dist.parallel.fragments import Kind, rectangle_size, whole
from slope_dist.sparse import codec
from slope_dist.transfer import Transfer


class CheckpointModel(StoredModel):
    """The weights of a checkpoint, in the precision that the run computed with.

    Every file is hashed when it is opened; metadata and numbers are checked as they are read.
    """

    def __init__(self, path: Path, tokenizer: Path | None = None, transfer: Transfer | None = None) -> None:
        """Open the checkpoint at `path`, or the newest that verifies of the run that `path` is the folder of.

        Args:
            path: a checkpoint, or a run folder.
            tokenizer: of the model; None: where the run's config says.
            transfer: told of the bytes that are hashed.

        Raises:
            UserError: if there is none.
            CheckpointError: if it is damaged, or is not what a run of this program writes.
        """
        refuse_unfinished(path)
        opened = open_folder(path, transfer)
        for line in opened.skipped:
            print(f"skipped: {visible(line)}", file=sys.stderr)
        self._checkpoint = opened.checkpoint
        if not opened.hashed:
            self._checkpoint.verify(self._checkpoint.manifest.files, transfer)
        self._tokenizer_path = tokenizer
        self.config = _config_of(self._checkpoint)
        self.model = self.config.model
        self.adapter_rank = self._adapter_rank()
        self.linears = forms_of(self.skeleton, self.config, self.adapter_rank)
        self.dtype = self._check()
        self.origin = Origin(self._checkpoint.path, "checkpoint", self._checkpoint.step)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """See `StoredModel`."""
        shape = self.shapes[name]
        rows = (start, shape[0] if stop is None else stop)
        kind: Kind = "metadata" if name.endswith(".weight.indices") else "weight"
        rectangle = (rows, *whole(shape)[1:])
        found = self._checkpoint.read(name, kind, rectangle, 0, rectangle_size(rectangle)).view(
            rows[1] - rows[0], *shape[1:]
        )
        if kind == "metadata":
            pattern = self.linears[name.removesuffix(".weight.indices")].pattern
            assert pattern is not None
            try:
                codec.check(found, pattern)
            except ValueError as error:
                raise CheckpointError(f"{self._checkpoint.path}: {name}: {error}") from error
        elif not all_finite(found):
            raise CheckpointError(f"{self._checkpoint.path}: {name}: expected finite numbers, found NaN or infinity")
        return found

    def tokenizer(self) -> Tokenizer:
        """The one that was given, or that of the run's corpora; it must be the one that the run read ids of."""
        places = [self._tokenizer_path] if self._tokenizer_path else self._usual_places()
        found = next((place for place in places if os.path.exists(place)), None)
        if found is None:
            place = places[0] if places else self.config.data.corpora[0].folder
            raise UserError(
                f"the tokenizer of {self._checkpoint.path} is not at {place}; name it with --tokenizer PATH"
            )
        tokenizer = load_tokenizer(found)
        expected = self._checkpoint.identity.get("tokenizer")
        if expected is not None and tokenizer.sha256 != expected:
            raise UserError(
                f"{found} is not the tokenizer that {self._checkpoint.path} was trained with: expected SHA-256 "
                f"{expected!s:.12}..., found {tokenizer.sha256:.12}...; name the right one with --tokenizer PATH"
            )
        end = self._checkpoint.identity.get("end_of_document")
        if end is not None and tokenizer.end_of_document != end:
            raise UserError(
                f"{found} ends a document with id {tokenizer.end_of_document}, and {self._checkpoint.path} was trained "
                f"with id {end}; name the one in the folder of its corpus, with its {CONFIG_FILE}"
            )
        return tokenizer

    def _usual_places(self) -> list[Path]:
        """Where training finds it: with a corpus, of which only some may have one, or where the config says."""
        data = self.config.data
        folders = [Path(part.folder) for part in data.corpora]
        having = [folder for folder in folders if any(os.path.exists(folder / name) for name in FILES)]
        return having + ([Path(data.tokenizer)] if data.tokenizer else [])

    def _adapter_rank(self) -> int:
        tensors = self._checkpoint.manifest.tensors
        downs = [tensor for key, tensor in tensors.items() if key.endswith(".adapter.down")]
        return downs[0].shape[0] if downs and downs[0].shape else 0

    def _check(self) -> torch.dtype:
        """The dtype of the weights.

        Raises:
            CheckpointError: if the tensors are not those of the config's model.
        """
        where, tensors = self._checkpoint.path, self._checkpoint.manifest.tensors
        dtypes = set()
        for name, shape in self.shapes.items():
            is_metadata = name.endswith(".weight.indices")
            tensor = tensors.get(f"{'metadata' if is_metadata else 'weight'}/{name}")
            if tensor is None or tensor.shape != shape or (tensor.dtype == "U8") != is_metadata:
                found = "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise CheckpointError(f"{where}: {name}: expected a tensor of shape {list(shape)}, found {found}")
            if not is_metadata:
                dtypes.add(DTYPES[tensor.dtype])
        extra = [key for key in tensors if key.startswith("weight/") and key.removeprefix("weight/") not in self.shapes]
        if extra:
            raise CheckpointError(f"{where}: {extra[0]}: expected only the tensors of the config's model")
        if len(dtypes) != 1:
            raise CheckpointError(f"{where}: expected weights of one dtype, found {', '.join(map(str, dtypes))}")
        return dtypes.pop()


def refuse_unfinished(path: Path) -> None:
    """Refuse the folder of a save that did not end, by its name."""
    if step_of(path.name.partition(".tmp-")[0]) is not None and ".tmp-" in path.name:
        raise UserError(f"{path} is a checkpoint whose save did not end; give a whole one, or the folder of the run")


def _config_of(checkpoint: Checkpoint) -> Config:
    try:
        return Config.model_validate(dict(checkpoint.config))
    except ValidationError as error:
        raise CheckpointError(f"{checkpoint.path}: config: {explain(error, set())}") from None
