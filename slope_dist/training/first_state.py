"""The state of a run's step 0, made of a model at rest.

Shape letters: O out, I in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slope_dist.config import Config
from slope_dist.data.tokenizer import Tokenizer
from slope_dist.engine.interface import MicroBatch
from slope_dist.errors import UserError
from slope_dist.export.options import DTYPES
from slope_dist.export.stored import LinearForm, StoredModel, forms_of, row_blocks
from slope_dist.export.target import refuse_without_room
from slope_dist.inference.model import loss_in_layers
from slope_dist.parallel.fragments import Fragment, Kind, whole
from slope_dist.sparse import CompressedMatrix, Pattern, codec, pruning
from slope_dist.training import fingerprint
from slope_dist.training.corpora import Corpora
from slope_dist.training.scratch import Scratch, size_of
from slope_dist.transfer import Transfer

_BLOCK_BYTES = 8 * 2**20
"""Of a matrix in fp32, as much as is pruned at a time: with blocks of 32 MiB and more it takes twice as long, because
the C library maps and zeroes what it makes of them anew."""

_TILE = 8
"""A multiple of every pattern's m: rows are taken in such numbers, so that no tile of the column mask is cut."""


@dataclass
class _Loss:
    """What pruning took of a layer: sums of squares of what is gone and of all there was.

    `pruned` says whether anything but zeros is gone.
    """

    lost: float = 0.0
    squares: float = 0.0
    pruned: bool = False


class _InLayers:
    """See `Evaluator`: a model of which one layer is in memory at a time."""

    def __init__(self, stored: StoredModel) -> None:
        self._stored = stored

    def evaluate(self, batch: MicroBatch) -> Tensor:
        """Mean loss: int64 [B, S] twice -> scalar."""
        return torch.tensor(loss_in_layers(self._stored, *batch), dtype=torch.float64)


class FirstState(StoredModel):
    """The state of step 0, in a scratch file; to be read as a model, whose loss is then that of the checkpoint."""

    def __init__(self, source: StoredModel, config: Config, folder: Path) -> None:
        self.origin = source.origin
        self.model = config.model
        self.dtype = DTYPES[config.precision]
        self._source = source
        self._config = config
        self.linears = forms_of(self.skeleton, config)
        plan = self._plan()
        # Both moments, of each trained element.
        moments = 2 * 4 * sum(prod(shape) for key, (shape, _) in plan.items() if key.startswith("weight/"))
        refuse_without_room(folder, 2 * size_of(plan) + moments, "choose another run.folder")
        self._scratch = Scratch(folder, plan)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """See `StoredModel`."""
        kind = "metadata" if name.endswith(".weight.indices") else "weight"
        return self._scratch[f"{kind}/{name}"][start:stop].clone()

    def tokenizer(self) -> Tokenizer:
        """That of the source."""
        return self._source.tokenizer()

    def fill(self, transfer: Transfer) -> list[str]:
        """Make every tensor; returns lines on what was pruned.

        Raises:
            UserError: if a number is beyond the range of the run's precision.
        """
        weights = {f"{name}.weight.{part}" for name in self.linears for part in ("values", "indices")}
        transfer.begin(4 * sum(prod(shape) for name, shape in self.shapes.items() if not name.endswith(".indices")))
        for name, shape in self.shapes.items():
            if name not in weights:
                for start, stop in row_blocks(shape, 4):
                    self._put(name, start, self._source.read(name, start, stop).float())
                    transfer.add(4 * prod(shape[1:]) * (stop - start))
        losses = []
        for name, form in self.linears.items():
            loss = self._fill_weight(name, form)
            transfer.add(4 * prod(self.shapes[f"{name}.weight.values"]))
            # What is written need not stay in memory.
            self._scratch.let_go()
            if form.pattern is not None:
                losses.append(loss)
        return _lines(losses)

    def fingerprint(self, corpora: Corpora) -> dict[str, Any]:
        """The loss of the fixed batch, as every checkpoint carries it.

        Raises:
            UserError: if it is not finite.
        """
        # All its windows at once: each layer is then made once.
        training = self._config.training.model_copy(update={"micro_batch_size": fingerprint.SAMPLES})
        config = self._config.model_copy(update={"training": training})
        found = fingerprint.measure(_InLayers(self), corpora.valid[0].corpus, config, 1, 0, by="layer by layer")
        if found["loss"] is None:
            raise UserError(
                f"{self.origin.path}: its loss in {self._config.precision} is not finite, so no run could go on "
                'from it; use precision "bf16" or "fp32"'
            )
        return found

    def fragments(self) -> Iterator[Fragment]:
        """The whole state, in the scratch file's own memory."""
        for key, (shape, _) in self._plan().items():
            kind, name = key.split("/")
            yield _fragment(kind, name, shape, self._scratch[key])  # type: ignore[arg-type]
            if kind == "weight":
                # One zero, seen as many.
                zeros = torch.zeros(()).expand(prod(shape))
                yield _fragment("exp_avg", name, shape, zeros)
                yield _fragment("exp_avg_sq", name, shape, zeros)

    def _plan(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of all that is not zero, by "<kind>/<name>"."""
        plan = {}
        for name, shape in self.shapes.items():
            if name.endswith(".weight.indices"):
                plan[f"metadata/{name}"] = (shape, torch.uint8)
                if self._config.sparsity.column_mask_interval > 1:
                    plan[f"metadata/{name.removesuffix('indices')}column_mask"] = (shape, torch.uint8)
            else:
                plan[f"weight/{name}"] = (shape, self.dtype)
                if self.dtype != torch.float32:
                    plan[f"master/{name}"] = (shape, torch.float32)
        return plan

    def _fill_weight(self, name: str, form: LinearForm) -> _Loss:
        """Make the weight of a linear layer, pruned where it must be; returns what that took."""
        source, pattern = self._source.linears[name], form.pattern
        loss = _Loss()
        if pattern is None:
            self._put(f"{name}.weight.values", 0, self._source.merged(name))
            return loss
        if source.pattern == pattern and not source.adapter_rank:
            matrix = self._source.matrix(name)
            for start, stop in _blocks_of_tiles(form.shape):
                values = matrix.values[start:stop].float()
                self._put_sparse(name, start, CompressedMatrix(values, matrix.indices[start:stop], pattern))
                loss.squares += _square(values)
            return loss
        dense = self._source.merged(name)
        for start, stop in _blocks_of_tiles(form.shape):
            rows = dense[start:stop]
            pruned = prune(rows, pattern)
            self._put_sparse(name, start, pruned)
            loss.squares += _square(rows)
            if pruned.values.count_nonzero() < rows.count_nonzero():
                loss.lost += _square(rows - pruned.expand())
                loss.pruned = True
        return loss

    def _put_sparse(self, name: str, start: int, rows: CompressedMatrix) -> None:
        """Write fp32 rows of a sparse weight, from `start` on; no tile of the column mask is cut."""
        stop = start + rows.shape[0]
        narrow = self._put(f"{name}.weight.values", start, rows.values)
        self._scratch[f"metadata/{name}.weight.indices"][start:stop] = rows.indices
        mask = f"metadata/{name}.weight.column_mask"
        if mask in self._scratch:
            kept = pruning.column_mask(narrow, rows.indices, rows.pattern)
            self._scratch[mask][start:stop] = codec.pack_bits(kept)

    def _put(self, name: str, start: int, values: Tensor) -> Tensor:
        """Write fp32 rows of a trained tensor, from `start` on; returns them in the run's precision."""
        narrow, stop = values.to(self.dtype), start + len(values)
        if not narrow.isfinite().all():
            raise UserError(
                f"{self.origin.path}: {name} holds {float(values.abs().max()):.6g}, which is beyond the range of "
                f'{self._config.precision}; use precision "bf16" or "fp32"'
            )
        self._scratch[f"weight/{name}"][start:stop] = narrow
        if self.dtype != torch.float32:
            self._scratch[f"master/{name}"][start:stop] = values
        return narrow


def prune(dense: Tensor, pattern: Pattern) -> CompressedMatrix:
    """One-shot magnitude pruning of fp32 [O, I].

    A matrix that satisfies the pattern is kept to the last bit: where zeros fill up a group, a -0.0 goes before a 0.0,
    which expanding makes again. Otherwise this is `CompressedMatrix.prune`.
    """
    negative_zeros = (dense == 0) & dense.signbit()
    if not negative_zeros.any():
        return CompressedMatrix.prune(dense, pattern)
    # Smaller than any fp32 number but zero.
    ranked = dense.double().masked_fill_(negative_zeros, 1e-300)
    indices = CompressedMatrix.prune(ranked, pattern).indices
    return CompressedMatrix(codec.gather(dense, indices, pattern), indices, pattern)


def _square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _blocks_of_tiles(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Cuts of the rows of a matrix [O, I] into blocks of about `_BLOCK_BYTES`, none inside a tile."""
    rows, columns = shape
    step = max(1, _BLOCK_BYTES // (4 * columns * _TILE)) * _TILE
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _lines(losses: list[_Loss]) -> list[str]:
    pruned = sum(loss.pruned for loss in losses)
    kept = len(losses) - pruned
    if not losses:
        return ["no linear layer of this run is sparse: nothing was pruned"]
    lines = []
    if pruned:
        part = sqrt(sum(loss.lost for loss in losses) / sum(loss.squares for loss in losses))
        lines.append(
            f"{pruned} of {len(losses)} sparse layers were pruned by magnitude, once: {part:.2%} of the norm of all is "
            "gone"
        )
    if kept:
        lines.append(f"{kept} of {len(losses)} sparse layers satisfied their pattern and were kept exactly")
    return lines


def _fragment(kind: Kind, name: str, shape: tuple[int, ...], tensor: Tensor) -> Fragment:
    return Fragment(name, kind, shape, whole(shape), 0, prod(shape), tensor.view(-1))
