"""The trainer: one run from its first step, or its newest checkpoint, to its last."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slope_dist import checkpoint
from slope_dist.checkpoint import Checkpoint, CheckpointError
from slope_dist.config import Config, Derived, derive
from slope_dist.data.corpus import Corpus
from slope_dist.data.prepare import prepare_if_absent
from slope_dist.data.sampling import BatchReader, rank_positions, windows_of
from slope_dist.engine import Engine
from slope_dist.engine.interface import MicroBatch
from slope_dist.parallel import collectives
from slope_dist.parallel.environment import Environment
from slope_dist.parallel.fragments import MemorySource
from slope_dist.parallel.groups import start as start_groups
from slope_dist.parallel.layout import Layout
from slope_dist.training.build import build_engine, check_engine, count_state
from slope_dist.training.evaluation import Evaluation, evaluate
from slope_dist.training.folder import RunFolder, identity
from slope_dist.training.guards import FiniteGuard
from slope_dist.training.journal import Journal, finite
from slope_dist.training.memory import refuse_what_will_not_fit
from slope_dist.training.progress import PeakMemory, ProgressLine, duration_text, size_text
from slope_dist.training.schedule import learning_rates


class Trainer:
    """One run. Collective: every rank makes one and calls `run`.

    Args:
        config: the run.
        environment: this process among the others; the process group exists.
        resume: "auto" or "never", see `RunFolder.resume_point`.
    """

    def __init__(self, config: Config, environment: Environment, resume: str = "auto") -> None:
        self.config = config
        self.environment = environment
        self.derived: Derived = derive(config, environment.world_size)
        parallel = config.parallel
        self.groups = start_groups(Layout(parallel.tensor, self.derived.data_ranks, parallel.pipeline))
        self.folder = RunFolder(config)
        self.last_checkpoint: Path | None = None
        with collectives.together():
            refuse_what_will_not_fit(config, self.derived, environment)
            check_engine(config)
        self.train_corpus, self.valid_corpus = self._open_corpora()
        self.notes = self.train_corpus.differs_from(config)
        self.identity = identity(config, self.train_corpus)
        # Nothing is written into a folder before it is known to be this run's.
        found, self.skipped_checkpoints = self.folder.resume_point(self.identity, self.derived.adapter_rank, resume)
        if found is None:
            self._verify_corpora()
        self.finished = found is not None and found.step >= config.training.steps and self._is_evaluated(found.step)
        if not self.finished:
            self.folder.open(config)
        self.reader = BatchReader(
            self.train_corpus,
            sequence_length=config.model.sequence_length,
            global_batch_size=config.training.global_batch_size,
            seed=config.run.seed,
        )
        self.guard = FiniteGuard(config.training.max_skipped_steps)
        self.step = 0
        self.adapters = False
        self.resumed_from: Checkpoint | None = found
        if found is not None:
            self.step = found.step
            self.adapters = bool(found.scalars["adapters"])
            self.guard.skipped = found.scalars["skipped_steps"]
            self.guard.in_a_row = found.scalars["skipped_in_a_row"]
            self.last_checkpoint = found.path
        self._engine: Engine | None = None
        self.journal: Journal | None = None
        self.progress = ProgressLine(
            first_step=self.step + 1,
            steps=config.training.steps,
            tokens_per_step=self.derived.tokens_per_step,
            flops_per_token=6.0 * count_state(config, self.derived, adapters=False).parameters.total,
            ranks=environment.world_size,
            log_interval=config.run.log_interval,
            show=environment.is_first,
        )
        self._switch_cost: dict[str, Any] = {}

    @property
    def engine(self) -> Engine:
        """The engine of the current phase."""
        assert self._engine is not None
        return self._engine

    def run(self) -> None:
        """Train to the last step."""
        try:
            self._start()
            while self.step < self.config.training.steps:
                step = self.step + 1
                if step >= self.derived.first_adapter_step and not self.adapters:
                    self._switch_to_adapters(step)
                self.engine.begin_step(step)
                rates = learning_rates(self.config, step, self.derived.first_adapter_step)
                self.engine.set_learning_rates(rates)
                result = self.engine.train_step(self._micro_batches(step))
                self.step = step
                speed = self.progress.step(step, result.loss, self.phase, result.skipped)
                self._record(step, result.loss, result.grad_norm, rates, speed, result.skipped)
                self.guard.check(step, result, self._samples(step))
                if self._due(self.config.checkpoint.interval):
                    self._save()
                if self._due(self.config.evaluation.interval):
                    self._evaluate()
            self._report()
        except BaseException:
            self._close_files()
            # Releasing an engine of several ranks may wait for the others, who have yet to hear of the error.
            if self.environment.world_size == 1:
                self.close()
            raise
        self.close()

    def close(self) -> None:
        """Release the engine and the files; harmless to call again."""
        self._close_files()
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _close_files(self) -> None:
        self.progress.close()
        if self.journal is not None:
            self.journal.close()
            self.journal = None

    @property
    def phase(self) -> str:
        """ "sparse" before the adapters join, "adapters" from then on."""
        return "adapters" if self.adapters else "sparse"

    def _start(self) -> None:
        """Build the engine of the phase the run is in, and load the checkpoint it goes on from."""
        self._engine = build_engine(
            self.config, self.derived, self.groups, adapters=self.adapters, draw=self.resumed_from is None
        )
        if self.resumed_from is not None:
            self._engine.load_state(self.resumed_from)
        with collectives.together():
            if self.environment.is_first:
                self.journal = Journal(self.folder, self.step)
        self.progress.start()
        if self.resumed_from is not None:
            self.progress.say(f"resumed from {self.resumed_from.path} after step {self.step}")
            if self._due(self.config.evaluation.interval) and not self._is_evaluated(self.step):
                self._evaluate()
        self.progress.pause()

    def _open_corpora(self) -> tuple[Corpus, Corpus]:
        config = self.config
        with collectives.together():
            if self.environment.is_first:
                prepare_if_absent(config)
        with collectives.together():
            train, valid = (
                Corpus.open(config.data.folder, split, config.model.vocab_size) for split in ("train", "valid")
            )
            # A split too short for one sample would otherwise end the run at its first evaluation.
            for corpus in (train, valid):
                windows_of(corpus, config.model.sequence_length)
        return train, valid

    def _verify_corpora(self) -> None:
        """Read the corpus of a new run once and compare it with its manifest; a resume trusts the manifest."""
        with collectives.together():
            if self.environment.is_first:
                for corpus in (self.train_corpus, self.valid_corpus):
                    if corpus.has_manifest:
                        corpus.verify()

    def _is_evaluated(self, step: int) -> bool:
        """Whether the evaluation after `step` is in the run folder, as rank 0 sees it."""
        evaluated = False
        with collectives.together():
            if self.environment.is_first:
                evaluated = self.folder.is_evaluated(step)
        return bool(collectives.broadcast_json(evaluated))

    def _micro_batches(self, step: int) -> Sequence[MicroBatch]:
        training = self.config.training
        batches = []
        for index in range(self.derived.accumulation_steps):
            positions = rank_positions(
                global_batch_size=training.global_batch_size,
                micro_batch_size=training.micro_batch_size,
                data_ranks=self.derived.data_ranks,
                data_rank=self.groups.position.data,
                micro_index=index,
            )
            batch = self.reader.batch(step, positions)
            batches.append((batch.tokens, batch.labels))
        return batches

    def _samples(self, step: int) -> tuple[int, int]:
        """First and last sample number of a step's global batch."""
        size = self.config.training.global_batch_size
        return (step - 1) * size, step * size - 1

    def _due(self, interval: int) -> bool:
        return self.step == self.config.training.steps or (interval > 0 and self.step % interval == 0)

    def _record(
        self, step: int, loss: float, norm: float, rates: dict[str, float], speed: float, skipped: str | None
    ) -> None:
        if self.journal is None:
            return
        row: dict[str, Any] = {
            "step": step,
            "loss": finite(loss),
            "lr": rates["base"],
            "grad_norm": finite(norm),
            "tokens": step * self.derived.tokens_per_step,
            "tokens_per_second": round(speed, 1),
            "phase": self.phase,
        }
        if self.adapters and rates["adapters"] != rates["base"]:
            row["lr_adapters"] = rates["adapters"]
        if skipped is not None:
            row["skipped"] = skipped
        self.journal.step(row | self._switch_cost)
        self._switch_cost = {}

    def _switch_to_adapters(self, step: int) -> None:
        """Rule R6: export the state, release the engine, build one with adapters, load. Nothing else changes."""
        start = time.perf_counter()
        with PeakMemory() as peak:
            fragments, scalars = self.engine.export_state()
            source = MemorySource.take(fragments, scalars)
            self.engine.close()
            self._engine = None
            self._engine = build_engine(self.config, self.derived, self.groups, adapters=True, draw=False)
            self._engine.load_state(source, new_adapters=True)
        self.adapters = True
        seconds = time.perf_counter() - start
        extra = "" if peak.bytes is None else f", memory rose by {size_text(peak.bytes)} at the peak"
        rank = self.derived.adapter_rank
        self.progress.say(f"adapters of rank {rank} join at step {step}: switched in {duration_text(seconds)}{extra}")
        self._switch_cost = {"switch_seconds": round(seconds, 3), "switch_peak_bytes": peak.bytes}
        self.progress.pause()

    def _save(self) -> None:
        fragments, scalars = self.engine.export_state()
        scalars |= {
            "adapters": self.adapters,
            "adapter_rank": self.derived.adapter_rank,
            "skipped_steps": self.guard.skipped,
            "skipped_in_a_row": self.guard.in_a_row,
            "tokens": self.step * self.derived.tokens_per_step,
        }
        try:
            self.last_checkpoint = checkpoint.save(
                self.folder.checkpoints,
                self.step,
                fragments,
                scalars,
                self.identity,
                self.config.model_dump(mode="json"),
            )
        except CheckpointError as error:
            if self.step == self.config.training.steps:
                raise
            self.progress.say(f"warning: {error}; training goes on")
        else:
            for problem in checkpoint.prune(self.folder.checkpoints, self.config.checkpoint.keep):
                self.progress.say(f"warning: {problem}")
        self.progress.pause()

    def _evaluate(self) -> Evaluation:
        data_rank = self.groups.position.data
        result = evaluate(self.engine, self.valid_corpus, self.config, self.derived.data_ranks, data_rank)
        bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte"
        self.progress.say(
            f"evaluation after step {self.step}: loss {result.loss:.4f}, perplexity {result.perplexity:.2f}{bits}"
        )
        if self.journal is not None:
            self.journal.evaluation(self.step, result)
            self.journal.draw(str(self.folder.path))
        self.progress.pause()
        return result

    def _report(self) -> None:
        self.progress.say(self.result())

    def result(self) -> str:
        """One line on a run that has nothing left to do."""
        steps = self.config.training.steps
        end = f"this run is finished after step {self.step}"
        if self.step > steps:
            end = f"this run is already past step {steps}, which training.steps asks for: step {self.step} is done"
        skipped = f"; {self.guard.skipped} non-finite steps were skipped" if self.guard.skipped else ""
        return (
            f"{end}{skipped}: metrics in {self.folder.metrics}, picture in {self.folder.picture}, "
            f"last checkpoint {self.last_checkpoint}"
        )
