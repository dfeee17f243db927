"""The way back in: a model at rest, dense or sparse, whoever trained it, becomes step 0 of a run."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from slope_dist.checkpoint import save
from slope_dist.checkpoint.format import LEFTOVER_NAME, step_of
from slope_dist.checkpoint.retention import discard
from slope_dist.config import Config, Derived, derive
from slope_dist.config.model import ModelConfig
from slope_dist.config.resolve import world_size
from slope_dist.errors import UserError
from slope_dist.export.stored import StoredModel
from slope_dist.training.build import count_state
from slope_dist.training.corpora import Corpora
from slope_dist.training.ending import LOCK, Turn
from slope_dist.training.first_state import FirstState
from slope_dist.training.folder import RunFolder, identity
from slope_dist.transfer import Transfer

_INITIAL = {"init_std", "scale_residual_init"}
"""Of a model's section: what only initial values depend on."""

_ROTARY_SCALING = ("rotary_low_factor", "rotary_high_factor", "rotary_original_length")


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

    One process does it, without a process group. What it makes lies in a file until it is saved; in memory is a layer
    at a time, and for the loss the activations of the fixed batch.

    Args:
        stored: the model.
        config: the run; its folder must hold no checkpoint, and its corpus be there or be one that a run would make.
        merge_adapters: add the model's adapters into its weights before these are pruned.
        transfer: told of the bytes that are made, and then of those that are written.

    Raises:
        UserError: if the model is not the config's, has adapters that are not to be merged, has another tokenizer than
            the corpus, or holds a number that is beyond the run's precision; if the folder is in use or is
            that of a run; if there is no corpus or no room. Nothing of the checkpoint is left then.
    """
    transfer = transfer or Transfer()
    derived = derive(config, world_size(config))
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
        lines.append("the adapters were merged into the weights before these were pruned")
    elif merge_adapters:
        lines.append("there are no adapters to merge")
    with _claimed(folder) as turn:
        lines += [turn.warning] if turn.warning else []
        _refuse_used(folder)
        state = FirstState(stored, config, folder.path)
        lines += state.fill(transfer)
        found = state.fingerprint(corpora)
        lines.append(f"loss of the fixed batch: {found['loss']:.4f}")
        saved = save(
            folder.checkpoints,
            0,
            state.fragments(),
            _scalars(config, derived, found),
            identity(config, corpora),
            config.model_dump(mode="json"),
            transfer=transfer,
        )
    return Begun(saved.path, saved.bytes, lines)


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
