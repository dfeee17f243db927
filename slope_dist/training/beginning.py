"""The way back in: a model at rest, dense or sparse, whoever trained it, becomes step 0 of a run."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slope_dist.checkpoint import save
from slope_dist.checkpoint.format import LEFTOVER_NAME, step_of
from slope_dist.checkpoint.retention import discard
from slope_dist.config import Config, Derived, derive
from slope_dist.config.model import ModelConfig
from slope_dist.data.tokenizer import Tokenizer
from slope_dist.engine.interface import MicroBatch
from slope_dist.errors import UserError
from slope_dist.export.stored import CHUNK_BYTES, LinearForm, StoredModel, forms_of, row_blocks
from slope_dist.export.target import refuse_without_room
from slope_dist.inference.model import loss_in_layers
from slope_dist.parallel.fragments import Fragment, Kind, whole
from slope_dist.sparse import CompressedMatrix, Pattern, codec, pruning
from slope_dist.training import fingerprint
from slope_dist.training.build import count_state
from slope_dist.training.corpora import Corpora
from slope_dist.training.ending import LOCK, Turn
from slope_dist.training.folder import RunFolder, identity
from slope_dist.training.scratch import Scratch, size_of
from slope_dist.transfer import Transfer

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_INITIAL = {"init_std", "scale_residual_init"}
"""Of a model's section: what only initial values depend on."""

_ROTARY_SCALING = ("rotary_low_factor", "rotary_high_factor", "rotary_original_length")

_TILE = 8
"""A multiple of every pattern's m: rows are taken in such numbers, so that no tile of the column mask is cut."""


class Begun(NamedTuple):
    """A run that can be started: its checkpoint of step 0, the bytes of it, and what the user should know."""

    path: Path
    bytes: int
    lines: list[str]


def begin_from(
    stored: StoredModel, config: Config, *, merge_adapters: bool = False, transfer: Transfer | None = None
) -> Begun:
    """Make the weights of a model the checkpoint of step 0 of a run that has not begun.

    The config decides which layers are sparse, and how. A weight that satisfies its pattern, dense or sparse, keeps
    every number; any other is pruned once, by magnitude, in fp32. Adam's state is zero.

    One process does it, without a process group. What it makes lies in files until it is saved; in memory are a few
    blocks of rows, and then a layer at a time, with the activations of the fixed batch.

    Args:
        stored: the model.
        config: the run; its folder must hold no checkpoint, and its corpus be there or be one that a run would make.
        merge_adapters: add the model's adapters into its weights before these are pruned.
        transfer: told of the bytes that are made, and then of those that are written.

    Raises:
        UserError: if the model is not the config's, has adapters that are not to be merged, has another tokenizer than
            the corpus, holds a number that is none or that the run's precision has not; if the folder is in use or is
            that of a run; if there is no corpus or no room. Nothing of the checkpoint is left then.
    """
    transfer = transfer or Transfer()
    derived = derive(config)
    # Its refusals are those of a run: of globs that name no layer.
    count_state(config, derived, adapters=False)
    _refuse_another_model(stored, config.model)
    if stored.has_adapters and not merge_adapters:
        raise UserError(
            f"{stored.origin.path} has adapters, and a run makes its own when they join; give --merge-adapters to add "
            "them into the weights before these are pruned, or convert a checkpoint from before they joined"
        )
    folder = RunFolder(config)
    _refuse_used(folder)
    corpora = Corpora(config, folder.path)
    lines = _compare_tokenizers(stored, corpora)
    if stored.has_adapters:
        lines.append("the adapters were merged into their weights, and then these pruned")
    with _claimed(folder) as turn:
        lines += [turn.warning] if turn.warning else []
        _refuse_used(folder)
        beginning = _Beginning(stored, config, folder.path)
        lines += beginning.fill(transfer)
        found = beginning.fingerprint(corpora)
        lines.append(f"loss of the fixed batch: {found['loss']:.4f}")
        saved = save(
            folder.checkpoints,
            0,
            beginning.fragments(),
            _scalars(config, derived, found),
            identity(config, corpora),
            config.model_dump(mode="json"),
            transfer=transfer,
        )
    return Begun(saved.path, saved.bytes, lines)


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


class _Beginning(StoredModel):
    """The state of step 0, in a scratch file; to be read as a model, whose loss is then that of the checkpoint."""

    def __init__(self, source: StoredModel, config: Config, folder: Path) -> None:
        self.origin = source.origin
        self.model = config.model
        self.dtype = _DTYPES[config.precision]
        self._source = source
        self._config = config
        self.linears = forms_of(self.skeleton, config)
        plan = self._plan()
        # Both moments, of each trained element.
        moments = 2 * 4 * sum(prod(shape) for key, (shape, _) in plan.items() if key.startswith("weight/"))
        refuse_without_room(folder, 2 * size_of(plan) + moments)
        self._scratch = Scratch(folder, plan)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """See `StoredModel`."""
        kind = "metadata" if name.endswith(".weight.indices") else "weight"
        return self._scratch[f"{kind}/{name}"][start:stop].clone()

    def tokenizer(self) -> Tokenizer:
        """That of the source."""
        return self._source.tokenizer()

    def fill(self, transfer: Transfer) -> list[str]:
        """Make every tensor; returns lines on what was pruned."""
        parts = {f"{name}.{part}" for name in self.linears for part in ("weight.values", "weight.indices")}
        transfer.begin(4 * sum(prod(shape) for name, shape in self.shapes.items() if not name.endswith(".indices")))
        for name, shape in self.shapes.items():
            if name not in parts:
                for start, stop in row_blocks(shape, 4):
                    self._put(name, start, stop, self._numbers(name, start, stop))
                    transfer.add(4 * prod(shape[1:]) * (stop - start))
        losses = []
        for name, form in self.linears.items():
            loss = _Loss()
            for start, stop in _blocks_of_tiles(form.shape):
                values = self._fill_rows(name, form, start, stop, loss)
                transfer.add(4 * values.numel())
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
        if not isfinite(found["loss"]):
            raise UserError(
                f"{self.origin.path}: its loss in {self._config.precision} is {found['loss']}, so no run could go on "
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

    def _fill_rows(self, name: str, form: LinearForm, start: int, stop: int, loss: _Loss) -> Tensor:
        """Rows of a linear layer's weight, pruned where they must be; returns their values."""
        if form.pattern is None:
            values = self._dense_rows(name, start, stop)
            self._put(f"{name}.weight.values", start, stop, values)
            return values
        matrix = self._sparse_rows(name, form.pattern, start, stop, loss)
        narrow = self._put(f"{name}.weight.values", start, stop, matrix.values)
        self._scratch[f"metadata/{name}.weight.indices"][start:stop] = matrix.indices
        mask = f"metadata/{name}.weight.column_mask"
        if mask in self._scratch:
            kept = pruning.column_mask(narrow, matrix.indices, form.pattern)
            self._scratch[mask][start:stop] = codec.pack_bits(kept)
        return matrix.values

    def _sparse_rows(self, name: str, pattern: Pattern, start: int, stop: int, loss: _Loss) -> CompressedMatrix:
        """fp32 rows of a weight under `pattern`."""
        form = self._source.linears[name]
        if form.pattern == pattern and not form.adapter_rank:
            values = self._numbers(f"{name}.weight.values", start, stop)
            loss.squares += _square(values)
            return CompressedMatrix(values, self._indices(name, pattern, start, stop), pattern)
        dense = self._dense_rows(name, start, stop)
        matrix = prune(dense, pattern)
        loss.squares += _square(dense)
        if matrix.values.count_nonzero() < dense.count_nonzero():
            loss.lost += _square(dense - matrix.expand())
            loss.pruned = True
        return matrix

    def _dense_rows(self, name: str, start: int, stop: int) -> Tensor:
        """fp32 rows of a weight with explicit zeros, and its adapter added."""
        form = self._source.linears[name]
        values = self._numbers(f"{name}.weight.values", start, stop)
        if form.pattern is not None:
            values = codec.expand(values, self._indices(name, form.pattern, start, stop), form.pattern)
        if form.adapter_rank:
            up, down = self._numbers(f"{name}.adapter.up", start, stop), self._numbers(f"{name}.adapter.down")
            values = values + up @ down / form.adapter_rank
        return values

    def _indices(self, name: str, pattern: Pattern, start: int, stop: int) -> Tensor:
        found = self._source.read(f"{name}.weight.indices", start, stop)
        try:
            codec.check(found, pattern)
        except ValueError as error:
            raise UserError(f"{self.origin.path}: {name}.weight.indices: {error}") from error
        return found

    def _numbers(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """fp32 rows of one of the source's tensors, all of them finite."""
        found = self._source.read(name, start, stop).float()
        if not found.isfinite().all():
            raise UserError(f"{self.origin.path}: {name}: expected finite numbers, found NaN or infinity")
        return found

    def _put(self, name: str, start: int, stop: int, values: Tensor) -> Tensor:
        """Write fp32 rows of a trained tensor; returns them in the run's precision."""
        narrow = values.to(self.dtype)
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
    return float(values.double().square().sum())


def _blocks_of_tiles(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Cuts of the rows of a matrix [O, I] into blocks of about `CHUNK_BYTES` in fp32, none inside a tile."""
    rows, columns = shape
    step = max(1, CHUNK_BYTES // (4 * columns * _TILE)) * _TILE
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


def _scalars(config: Config, derived: Derived, found: dict[str, Any]) -> dict[str, Any]:
    """See `RunState`: of a run that has taken no step."""
    return {
        "optimizer_steps": {"decay": 0, "no_decay": 0},
        "seed": config.run.seed,
        "next_sample": 0,
        "adapters": False,
        "adapter_rank": derived.adapter_rank,
        "first_adapter_step": derived.first_adapter_step,
        "skipped_steps": 0,
        "skipped_in_a_row": 0,
        "tokens": 0,
        "fingerprint": found,
    }


def _refuse_another_model(stored: StoredModel, here: ModelConfig) -> None:
    """Refuse a source whose sizes are not the config's; shorter samples are well where positions are not learned."""
    there, wanted = _sizes(stored.model), _sizes(here)
    rotary = here.family in ("llama", "mistral")
    for key in there:
        if there[key] == wanted[key] or (key == "sequence_length" and rotary and wanted[key] < there[key]):
            continue
        most = " at most" if key == "sequence_length" and rotary else ""
        raise UserError(
            f"{stored.origin.path} has model.{key} {json.dumps(there[key])}, and the config "
            f"{json.dumps(wanted[key])}; set it to{most} {json.dumps(there[key])}, or choose another model"
        )


def _sizes(model: ModelConfig) -> dict[str, Any]:
    """What a model's weights and products depend on, with what null stands for filled in."""
    sizes = {key: value for key, value in model.model_dump(mode="json").items() if key not in _INITIAL}
    sizes |= {
        "num_kv_heads": model.num_kv_heads or model.num_heads,
        "embedding_size": model.token_embedding_size,
        "tied_head": model.has_tied_head,
    }
    if model.rotary_scaling is None:
        sizes |= dict.fromkeys(_ROTARY_SCALING)
    return sizes


def _compare_tokenizers(stored: StoredModel, corpora: Corpora) -> list[str]:
    """Lines on what could not be compared.

    Raises:
        UserError: if the corpus's ids are not the model's.
    """
    corpus = next((part.corpus for part in corpora.train if part.corpus.tokenizer is not None), None)
    if corpus is None or corpus.tokenizer is None:
        return ["the corpus has no tokenizer with it: nothing shows that its ids are those of the model"]
    try:
        tokenizer = stored.tokenizer()
    except UserError as error:
        return [f"nothing shows that the ids of {corpus.folder} are those of the model: {error}"]
    if not tokenizer.same_ids(corpus.tokenizer):
        raise UserError(
            f"the tokenizer of {stored.origin.path} is not that of {corpus.folder} (SHA-256 {tokenizer.sha256:.12}... "
            f"and {corpus.tokenizer.sha256:.12}...): ids would mean other things than the model has learned; prepare "
            "the corpus with the model's (tools/prepare_data.py --tokenizer)"
        )
    return []


def _refuse_used(folder: RunFolder) -> None:
    try:
        names = os.listdir(folder.checkpoints)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{folder.checkpoints} cannot be read: {error.strerror or error}") from error
    if any(step_of(name) is not None for name in names):
        raise UserError(
            f"{folder.checkpoints} already holds checkpoints; choose another run.folder, or go on from these"
        )


@contextlib.contextmanager
def _claimed(folder: RunFolder) -> Iterator[Turn]:
    """The run folder, made and held by this process; as it was before if the block fails."""
    missing = [path for path in (folder.checkpoints, folder.path, *folder.path.parents) if not path.exists()]
    turn = Turn(folder.path)
    try:
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        turn.take()
        turn.sign()
        try:
            yield turn
        except BaseException:
            # A save that was interrupted. Who holds the folder saves alone.
            for name in filter(LEFTOVER_NAME.fullmatch, os.listdir(folder.checkpoints)):
                discard(folder.checkpoints / name)
            if folder.path in missing:
                (folder.path / LOCK).unlink(missing_ok=True)
            raise
    except BaseException as error:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError):
            what = f"{error.filename}: " if error.filename else ""
            raise UserError(f"{folder.path} was not written: {what}{error.strerror or error}") from error
        raise
    finally:
        turn.release()
