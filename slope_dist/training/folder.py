"""The run folder: whose it is, and which checkpoint a run in it goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slope_dist.checkpoint import Checkpoint, find_newest_on_all_ranks
from slope_dist.checkpoint.format import MANIFEST, step_of
from slope_dist.checkpoint.retention import looks_complete
from slope_dist.config import Config, dump_config, run_folder
from slope_dist.config.model import ModelConfig
from slope_dist.config.sections import SparsityConfig
from slope_dist.errors import UnfinishedError, UserError
from slope_dist.files import read_bounded
from slope_dist.parallel import collectives
from slope_dist.training.corpora import Corpora
from slope_dist.training.state import state_of, training_steps_of
from slope_dist.transfer import Transfer

CONFIG = "config.json"
METRICS = "metrics.jsonl"
PICTURE = "loss.png"
CHECKPOINTS = "checkpoints"

# Some 300 bytes a step.
_MAX_METRICS_BYTES = 2**32


def identity(config: Config, corpora: Corpora) -> dict[str, Any]:
    """What two runs must share for one to go on from the other: model, masks, data and their order."""
    return {
        "model": config.model.model_dump(mode="json"),
        "seed": config.run.seed,
        "sparsity": {
            "pattern": config.sparsity.pattern,
            "column_mask_interval": config.sparsity.column_mask_interval,
            "dense_layers": list(config.sparsity.dense_layers),
            "layer_patterns": list(config.sparsity.layer_patterns),
        },
        "global_batch_size": config.training.global_batch_size,
        "data": corpora.fingerprint,
        "tokenizer": corpora.tokenizer_sha256,
        "end_of_document": corpora.end_of_document,
    }


def with_defaults(stored: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A stored identity with the keys that its writer did not know yet: it had what is the default today.

    What had none, and is not known of it, is taken to be that of the run at hand.
    """
    completed = {"end_of_document": own["end_of_document"], **stored}
    if isinstance(stored.get("model"), Mapping):
        completed["model"] = ModelConfig.model_construct().model_dump(mode="json", warnings=False) | stored["model"]
    if isinstance(stored.get("sparsity"), Mapping):
        completed["sparsity"] = {"layer_patterns": list(SparsityConfig().layer_patterns)} | stored["sparsity"]
    return completed


def differences(there: Mapping[str, Any], here: Mapping[str, Any], path: str = "") -> list[str]:
    """Where two identities differ: "model.hidden_size 256 there, 512 here"."""
    lines = []
    for key in sorted({*there, *here}):
        name = f"{path}{key}"
        first, second = there.get(key), here.get(key)
        if isinstance(first, Mapping) and isinstance(second, Mapping):
            lines += differences(first, second, f"{name}.")
        elif first != second:
            lines.append(f"{name} {_short(first)} there, {_short(second)} here")
    return lines


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; none where there is no file. A last line that a kill cut short is left out.

    Raises:
        UserError: if the file cannot be read or another line of it is not a row.
    """
    try:
        lines = read_bounded(path, _MAX_METRICS_BYTES).splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif number < len(lines):
            raise UserError(f"{path}, line {number} is not a row of metrics; mend that line, or move the file away")
    return rows


@dataclass(frozen=True)
class Resume:
    """How a command line wants a folder with checkpoints to be treated.

    Attributes:
        mode: "auto" goes on from what is there; "never" refuses a folder that holds checkpoints.
        accept_steps: another `training.steps` is meant, although the adapters have joined.
    """

    mode: str = "auto"
    accept_steps: bool = False


_FREE = ("run", "parallel", "data", "checkpoint", "evaluation", "watch")
"""Sections that may change between two parts of a run without a word; data are compared by their hashes."""


def changed_settings(there: Mapping[str, Any], config: Config) -> list[str]:
    """Where a checkpoint's config differs from the one at hand in what the run's numbers depend on."""
    then, now = (
        {key: value for key, value in settings.items() if key not in _FREE}
        for settings in (there, config.model_dump(mode="json"))
    )
    # In fp32 it changes nothing.
    if "fp32" not in (there.get("precision"), config.precision):
        name = "parallel.gradient_dtype"
        then[name], now[name] = there.get("parallel", {}).get("gradient_dtype"), config.parallel.gradient_dtype
    return differences(then, now)


class RunFolder:
    """Paths of one run, opened and checked on all ranks together.

    Attributes:
        damaged: names of the newer checkpoints that a resume has passed over, and no save has replaced since.
    """

    def __init__(self, config: Config) -> None:
        self.path = Path(run_folder(config))
        self.checkpoints = self.path / CHECKPOINTS
        self.metrics = self.path / METRICS
        self.picture = self.path / PICTURE
        self.damaged: set[str] = set()
        self._looked_at: set[str] = set()

    def make(self) -> None:
        """Make the folder, on rank 0.

        Raises:
            UserError: on every rank, if it cannot be made or read.
        """

        def make() -> None:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            os.listdir(self.checkpoints)

        self._on_first_rank(make)

    def open(self, config: Config) -> None:
        """Write the resolved config into the folder, on rank 0, which holds it by now.

        Raises:
            UnfinishedError: on every rank, if there are checkpoints that `resume_point` has not seen: another job had
                the folder since then.
            UserError: on every rank, if it cannot be read or written.
        """

        def write() -> None:
            new = sorted(self._names() - self._looked_at)
            if new:
                raise UnfinishedError(
                    f"another job has had run.folder {self.path} meanwhile, and left {new[-1]}; start again to go on "
                    "from it, or choose another run.folder"
                )
            partial = self.path / f".{CONFIG}.partial"
            partial.write_text(dump_config(config))
            os.replace(partial, self.path / CONFIG)

        self._on_first_rank(write)

    def _on_first_rank(self, work: Callable[[], None]) -> None:
        with collectives.together():
            try:
                if collectives.rank() == 0:
                    work()
            except OSError as failure:
                text = f"{failure.strerror or failure} ({failure.filename})"
                raise UserError(f"run.folder {self.path} cannot be used: {text}") from failure

    def newest_complete(self, known: Path | None) -> Path | None:
        """The newest checkpoint that looks complete, for a message; its bytes are not read.

        Args:
            known: one that this process has written or verified, of which a manifest that is there is enough: to
                decode that of many ranks takes a minute.
        """
        with suppress(OSError):
            steps = {step: path for step, path in self._by_step().items() if path.name not in self.damaged}
            for step in sorted(steps, reverse=True):
                path = steps[step]
                if (path / MANIFEST).is_file() if path == known else looks_complete(path):
                    return path
        return None

    def _by_step(self) -> dict[int, Path]:
        return {step: path for path in self.checkpoints.iterdir() if (step := step_of(path.name)) is not None}

    def _names(self) -> set[str]:
        return {path.name for path in self._by_step().values()}

    def is_evaluated(self, step: int) -> bool:
        """Whether the evaluation after `step` is written and drawn."""
        evaluated = any(row["step"] == step and "eval_loss" in row for row in read_rows(self.metrics))
        return evaluated and os.path.exists(self.picture)

    def resume_point(
        self, own: Mapping[str, Any], config: Config, adapter_rank: int, how: Resume, transfer: Transfer
    ) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that verifies, if it is of this run, and why newer ones were passed over.

        Args:
            own: the identity of the run at hand.
            config: its config.
            adapter_rank: rank of its adapters; free to change until they are on.
            how: what the command line says.
            transfer: told of the bytes that are read.

        Raises:
            UserError: if the folder holds another run's checkpoints, or only damaged ones: starting over would lose
                what they hold.
        """
        with suppress(OSError):
            self._looked_at = self._names()
        search = find_newest_on_all_ranks(self.checkpoints, transfer)
        newest, damaged = search.checkpoint, search.damaged
        if how.mode == "never" and (newest is not None or damaged):
            raise UserError(
                f"{self.checkpoints} already holds checkpoints; choose another run.folder, or resume them with "
                "--resume auto"
            )
        if newest is None and damaged:
            raise UserError(
                f"no checkpoint in {self.checkpoints} can be loaded, and starting over would hide that: "
                f"{damaged[0]}; restore one, or choose another run.folder"
            )
        if newest is not None:
            if damaged:
                with suppress(OSError):
                    self.damaged = {path.name for step, path in self._by_step().items() if step > newest.step}
            differing = differences(with_defaults(newest.identity, own), own)
            if differing:
                raise UserError(
                    f"{newest.path} is of another run: {'; '.join(differing[:4])}; choose another run.folder"
                )
            state, steps = state_of(newest), training_steps_of(newest)
            if state.adapters and state.adapter_rank != adapter_rank:
                raise UserError(
                    f"{newest.path} already has adapters of rank {state.adapter_rank}, and adapters.rank asks for "
                    f"{adapter_rank}: once on they stay as they are; restore it, or choose another run.folder"
                )
            if state.adapters and steps != config.training.steps and not how.accept_steps:
                raise UserError(
                    f"{newest.path} already has adapters, which joined for the last steps of {steps}, and "
                    f"training.steps asks for {config.training.steps}; restore it, or give --accept-steps: the "
                    "adapters then stay on, for as many steps as that makes"
                )
        return newest, search.skipped
