"""The trainer: one run from its first step, or its newest checkpoint, to its last."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from slope_dist.checkpoint import Checkpoint, CheckpointError, Outcome, Retention, Saver
from slope_dist.checkpoint.format import folder_name
from slope_dist.checkpoint.saver import Patience
from slope_dist.comparing.ranks import RankComparison
from slope_dist.config import Config, Derived, derive
from slope_dist.data.corpus import Corpus
from slope_dist.data.sampling import BatchReader, rank_positions
from slope_dist.engine import Engine
from slope_dist.engine.interface import MicroBatch
from slope_dist.output import tell
from slope_dist.parallel import collectives
from slope_dist.parallel.environment import Environment
from slope_dist.parallel.fragments import Fragment, MemorySource
from slope_dist.parallel.groups import start as start_groups
from slope_dist.parallel.layout import Layout
from slope_dist.training import fingerprint
from slope_dist.training.build import build_engine, check_engine
from slope_dist.training.corpora import Corpora
from slope_dist.training.ending import Turn
from slope_dist.training.evaluation import Evaluation, evaluate, evaluate_mixture
from slope_dist.training.folder import Resume, RunFolder, changed_settings, identity
from slope_dist.training.guards import FiniteGuard, RunFailedError
from slope_dist.training.journal import Journal, finite
from slope_dist.training.memory import refuse_what_will_not_fit
from slope_dist.training.products import start_products
from slope_dist.training.progress import PeakMemory, ProgressLine
from slope_dist.training.schedule import learning_rates
from slope_dist.training.state import state_of
from slope_dist.training.stopping import LastSave, Stopper
from slope_dist.training.utilization import find_utilization
from slope_dist.transfer import Transfer, duration_text, size_text
from slope_dist.watching.heartbeat import begin_step, doing

LAST_WAIT, SHORT_WAIT = 600.0, 2.0
"""Seconds that a run which fails leaves to the save under way: where all ranks end together, and where one does."""


class Trainer:
    """One run. Collective: every rank makes one and calls `run`.

    Args:
        config: the run.
        environment: this process among the others; the process group exists.
        resume: how to treat a folder with checkpoints.
        stopper: hears of requests to stop; None: one that hears of no signals.

    Attributes:
        step: the last one that is done, here or before the checkpoint that the run goes on from.
        first_step: the first that is to be done here.
        stopped: why the run left before its last step; "" if it did not.
        resumed_from: the folder of the checkpoint that the run goes on from; None if it starts at its first step.
    """

    def __init__(
        self,
        config: Config,
        environment: Environment,
        resume: Resume | None = None,
        stopper: Stopper | None = None,
    ) -> None:
        self.config = config
        self.environment = environment
        self.stopper = stopper or Stopper(environment)
        self.stopped = ""
        self.derived: Derived = derive(config, environment.world_size)
        parallel = config.parallel
        self.groups = start_groups(Layout(parallel.tensor, self.derived.data_ranks, parallel.pipeline))
        self.folder = RunFolder(config)
        self.turn = Turn(self.folder.path)
        self.last_checkpoint: Path | None = None
        with collectives.together():
            refuse_what_will_not_fit(config, self.derived, environment)
            check_engine(config)
        self._take_turn()
        self.corpora = Corpora(config, self.folder.path)
        self.notes = self.corpora.notes
        self.identity = identity(config, self.corpora)
        # Nothing is written into a folder before it is known to be this run's.
        found, self.skipped_checkpoints = self.folder.resume_point(
            self.identity,
            config,
            self.derived.adapter_rank,
            resume or Resume(),
            Transfer("verifying checkpoints", tell if environment.is_first else None),
        )
        self.corpora.verify()
        if found is not None:
            self.notes += [f"goes on with other settings: {line}" for line in changed_settings(found.config, config)]
        self.finished = found is not None and found.step >= config.training.steps and self._is_evaluated(found.step)
        if not self.finished:
            self.folder.make()
            self._take_turn()
            self.folder.open(config)
            self.turn.sign()
            self.corpora.remember()
        self.reader = BatchReader(
            self.corpora.train,
            sequence_length=config.model.sequence_length,
            global_batch_size=config.training.global_batch_size,
            seed=config.run.seed,
        )
        self.guard = FiniteGuard(config.training.max_skipped_steps)
        self.step = 0
        self.adapters = False
        self.first_adapter_step = self.derived.first_adapter_step
        self.resumed_from: Path | None = None if found is None else found.path
        self._source = found
        if found is not None:
            state = state_of(found)
            self.step = found.step
            self.adapters = state.adapters
            if self.adapters:
                # Once on they stay, also where another number of steps would let them join later.
                self.first_adapter_step = state.first_adapter_step
            elif self.first_adapter_step <= self.step < config.training.steps:
                # Their warm-up counts from where they do join.
                self.notes.append(
                    f"the adapters were to join at step {self.first_adapter_step}, which is done without them: they "
                    f"join at step {self.step + 1}"
                )
                self.first_adapter_step = self.step + 1
            self.guard.skipped = state.skipped_steps
            self.guard.in_a_row = state.skipped_in_a_row
            self.last_checkpoint = found.path
        self.first_step = self.step + 1
        self._engine: Engine | None = None
        self.saver: Saver | None = None
        self.journal: Journal | None = None
        self.ranks = RankComparison(config.watch, config.training.steps)
        self.progress = ProgressLine(
            first_step=self.first_step,
            steps=config.training.steps,
            tokens_per_step=self.derived.tokens_per_step,
            utilization=find_utilization(config, self.derived),
            log_interval=config.run.log_interval,
            show=environment.is_first,
        )
        self._switch_cost: dict[str, Any] = {}
        self._said_not_finite = False

    @property
    def engine(self) -> Engine:
        """The engine of the current phase."""
        assert self._engine is not None
        return self._engine

    def run(self) -> None:
        """Train to the last step, or until the run is asked to stop."""
        try:
            self._start()
            while self.step < self.config.training.steps and not self._asked_to_stop():
                step = self.step + 1
                begin_step(step)
                if step >= self.first_adapter_step and not self.adapters:
                    self._switch_to_adapters(step)
                self.engine.begin_step(step)
                rates = learning_rates(self.config, step, self.first_adapter_step)
                self.engine.set_learning_rates(rates)
                result = self.engine.train_step(self._micro_batches(step))
                self.step = step
                speed = self.progress.step(step, result.loss, self.phase, result.skipped)
                self._record(step, result.loss, result.grad_norm, rates, speed, result.skipped)
                self.guard.check(step, result, self._samples(step))
                self._compare_ranks()
                if self._due(self.config.checkpoint.interval):
                    self._save()
                if self._due(self.config.evaluation.interval):
                    self._evaluate()
                self._hear_of_saves()
            self._end()
        except BaseException as error:
            if self.saver is not None:
                # If the other ranks are well, the save under way can be. Where all fail alike it is worth any wait.
                with doing("the end after an error", long=True):
                    self.saver.linger(LAST_WAIT if isinstance(error, RunFailedError) else SHORT_WAIT)
            self._close_files()
            # Releasing an engine of several ranks may wait for the others, who have yet to hear of the error.
            if self.environment.world_size == 1:
                self.close()
            raise
        self.close()

    def close(self) -> None:
        """Release the engine and the files; harmless to call again."""
        self._close_files()
        if self.saver is not None:
            self.saver.close()
            self.saver = None
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
        lines = [*start_products(self.config, self.derived, self.folder.path), self.progress.utilization.basis]
        if self.environment.is_first:
            tell("\n".join(lines))
        self._engine = build_engine(
            self.config, self.derived, self.groups, adapters=self.adapters, draw=self.resumed_from is None
        )
        if self._source is not None:
            self._load(self._engine, self._source)
        with collectives.together():
            if self.environment.is_first:
                self.journal = Journal(self.folder, self.step, self.progress.say)
        self.saver = self._make_saver()
        # Its files stay mapped as long as it lives, and so on the disk when retention has removed them.
        self._source = None
        self.progress.start()
        # From here on there is a state to save, and somebody who asks.
        self.stopper.defer(self.folder.path)
        if self.resumed_from is not None:
            self.progress.say(f"resumed from {self.resumed_from} after step {self.step}")
            if self._due(self.config.evaluation.interval) and not self._is_evaluated(self.step):
                self._evaluate()
        self.progress.pause()

    def _load(self, engine: Engine, source: Checkpoint) -> None:
        """Take over a checkpoint, and see that its state gives the loss that it gave when it was saved."""
        say = tell if self.environment.is_first else None
        engine.load_state(source, transfer=Transfer(f"loading {source.path.name}", say))
        found = self._fingerprint()
        line = fingerprint.compare(state_of(source).fingerprint.model_dump(), found, str(source.path))
        if line is not None:
            self.progress.say(f"warning: {line}")

    def _fingerprint(self) -> dict[str, Any]:
        data_rank = self.groups.position.data
        first = self.corpora.valid[0].corpus
        return fingerprint.measure(self.engine, first, self.config, self.derived.data_ranks, data_rank)

    def _fingerprint_to_save(self) -> dict[str, Any]:
        found = self._fingerprint()
        if found["loss"] is None and not self._said_not_finite:
            self._said_not_finite = True
            self.progress.say(
                f"warning: the loss of the fixed batch, the first {found['samples']} windows of the validation split, "
                "is not finite: a resume cannot show by it that it computes the same"
            )
        return found

    def _make_saver(self) -> Saver:
        settings = self.config.checkpoint
        retention = Retention(self.folder.checkpoints, settings.keep, settings.keep_every)
        if self._source is not None:
            retention.trust(self._source.path, self._source.sizes)
        say = self.progress.say if self.environment.is_first else None
        return Saver(
            self.folder.checkpoints,
            retention,
            asynchronous=settings.asynchronous,
            say=say,
            hear=self._hear_of_saves,
        )

    def _take_turn(self) -> None:
        with collectives.together():
            if self.environment.is_first:
                self.turn.take()
        if self.turn.warning is not None:
            self.notes.append(self.turn.warning)
            self.turn.warning = None

    def _asked_to_stop(self) -> bool:
        self.stopped = self.stopped or self.stopper.agreed()
        return bool(self.stopped)

    def _is_evaluated(self, step: int) -> bool:
        """Whether the evaluation after `step` is in the run folder, as rank 0 sees it."""
        evaluated = False
        with collectives.together():
            if self.environment.is_first:
                evaluated = self.folder.is_evaluated(step)
        return bool(collectives.broadcast_json(evaluated))

    @doing("reading its batch")
    def _micro_batches(self, step: int) -> Sequence[MicroBatch]:
        training = self.config.training
        batches = []
        with self.ranks.loading():
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
        mfu = self.progress.utilization.mfu(speed)
        if mfu is not None:
            row["mfu"] = round(mfu, 4)
        if self.adapters and rates["adapters"] != rates["base"]:
            row["lr_adapters"] = rates["adapters"]
        if skipped is not None:
            row["skipped"] = skipped
        self.journal.step(row | self._switch_cost)
        self._switch_cost = {}

    def _compare_ranks(self) -> None:
        """Look for slow ranks and differing copies; before a save, which would make the difference last.

        Raises:
            RunFailedError: if copies differ and the config says that the run is to stop then.
        """
        findings = self.ranks.look(self.step, self.engine)
        for finding in findings:
            self.progress.say(finding.line)
            if self.journal is not None:
                self.journal.finding(self.step, finding)
        if self.config.watch.on_drift == "stop":
            for finding in findings:
                if finding.damage:
                    raise RunFailedError(finding.line.removeprefix("warning: "))

    @doing("the switch to adapters", long=True, afresh=True)
    def _switch_to_adapters(self, step: int) -> None:
        """Rule R6: export the state, release the engine, build one with adapters, load. Nothing else changes."""
        start = time.perf_counter()
        with PeakMemory() as peak:
            # No name for the fragments: it would keep a GPU's memory until the end of the switch.
            source = MemorySource.take(*self.engine.export_state())
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

    def _export(self, made: dict[str, Any]) -> tuple[Iterable[Fragment], dict[str, Any]]:
        """The state of now: live fragments, and what is not a tensor, of which `made` is what the engine has not."""
        fragments, scalars = self.engine.export_state()
        return fragments, scalars | made

    @doing("a save", long=True)
    def _save(self, patience: Patience | None = None) -> None:
        """Save the state of now; with `patience`, wait for it."""
        assert self.saver is not None
        # The order of samples, masks and initial values follow from the seed and the step alone (rule R3), so this is
        # the whole state of all generators and samplers.
        made = {
            "seed": self.config.run.seed,
            "next_sample": self.step * self.config.training.global_batch_size,
            "adapters": self.adapters,
            "adapter_rank": self.derived.adapter_rank,
            "first_adapter_step": self.first_adapter_step,
            "skipped_steps": self.guard.skipped,
            "skipped_in_a_row": self.guard.in_a_row,
            "tokens": self.step * self.derived.tokens_per_step,
            "fingerprint": self._fingerprint_to_save(),
        }
        config = self.config.model_dump(mode="json")
        self.saver.save(self.step, partial(self._export, made), self.identity, config, patience=patience)
        self._hear_of_saves()
        self.progress.pause()

    def _hear_of_saves(self) -> None:
        assert self.saver is not None
        for outcome in self.saver.outcomes():
            for problem in outcome.problems:
                self.progress.say(f"warning: {problem}")
                if self.journal is not None:
                    self.journal.problem(outcome.step, problem)
            if outcome.path is not None:
                self.last_checkpoint = outcome.path
                self.folder.damaged.discard(outcome.path.name)
                self._record_save(outcome)

    def _record_save(self, outcome: Outcome) -> None:
        self.progress.say(
            f"saved step {outcome.step}: {size_text(outcome.bytes)} in {duration_text(outcome.seconds)}, "
            f"training stood still for {duration_text(outcome.stall_seconds)}"
        )
        if self.journal is not None:
            self.journal.save(outcome)

    @doing("an evaluation")
    def _evaluate(self) -> None:
        def one(corpus: Corpus) -> Evaluation | None:
            data_rank, samples = self.groups.position.data, self.config.evaluation.samples
            return evaluate(
                self.engine,
                corpus,
                self.config,
                self.derived.data_ranks,
                data_rank,
                samples=samples,
                given_up=self._asked_to_stop,
            )

        result = evaluate_mixture(self.corpora.valid, one)
        if result is None:
            return
        self.progress.say(f"evaluation after step {self.step}: {result}")
        if self.journal is not None:
            self.journal.evaluation(self.step, result)
            self.journal.draw(str(self.folder.path))
        self.progress.pause()

    @doing("the end of the run", long=True)
    def _end(self) -> None:
        """See that the last state is saved, and say how the run ended.

        Raises:
            CheckpointError: if it cannot be saved.
        """
        assert self.saver is not None
        self.saver.wait()
        self._hear_of_saves()
        if not self._is_saved() and self.step > 0:
            self._save(LastSave(self.stopper, stopped=bool(self.stopped)))
            if not self._is_saved():
                raise CheckpointError(f"{self.folder.checkpoints}: step {self.step} could not be saved, see above")
        self.stopper.obeyed(self.stopped)
        self.progress.say(self.result())

    def _is_saved(self) -> bool:
        """Whether the state of now is. Saves end alike on all ranks, so they agree on it."""
        return self.last_checkpoint is not None and self.last_checkpoint.name == folder_name(self.step)

    def newest_complete(self) -> Path | None:
        """The checkpoint that the run could be gone on from, for a message."""
        return self.folder.newest_complete(self.last_checkpoint)

    def result(self) -> str:
        """One line on a run that has nothing left to do."""
        steps = self.config.training.steps
        if self.stopped:
            return (
                f"stopped by {self.stopped} after step {self.step} of {steps}; last checkpoint {self.last_checkpoint}"
            )
        end = f"this run is finished after step {self.step}"
        if self.step > steps:
            end = f"this run is already past step {steps}, which training.steps asks for: step {self.step} is done"
        skipped = f"; {self.guard.skipped} non-finite steps were skipped" if self.guard.skipped else ""
        return (
            f"{end}{skipped}: metrics in {self.folder.metrics}, picture in {self.folder.picture}, "
            f"last checkpoint {self.last_checkpoint}"
        )
