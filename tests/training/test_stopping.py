"""Claim: a run that is asked to stop, on one rank or all, by a signal or a file, wherever it is, saves the step it has
done, leaves with all its ranks, says so in end.json, and goes on later as if nothing had been. Its last save is tried
for as long as a run can wait.

Run: pytest tests/training/test_stopping.py
"""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slope_dist.checkpoint import CheckpointError
from slope_dist.cluster.requeue import decide
from slope_dist.errors import EXIT_STOPPED
from slope_dist.parallel.environment import Environment
from slope_dist.training import stopping
from slope_dist.training.ending import END_FILE
from slope_dist.training.stopping import JOB_STOP_FILE, STOP_FILE, StopNow, Stopper
from tests.distributed import Outcome, end_ranks
from tests.runs import evaluation_rows, newest, pretrain, step_rows, watch_engines, write_config

STEPS = 6
CHANGES: dict[str, Any] = {
    "training__steps": STEPS,
    "adapters__fraction": 0.34,
    "evaluation__interval": 2,
    "checkpoint__interval": 3,
}
ALONE = Environment(0, 1, 0, 1, "none")


def asked_to_stop(config: str, place: str, how: str, ranks: list[int]) -> None:
    """The entry point; the `ranks` are asked to stop in a place of the run."""
    if int(os.environ.get("RANK", "0")) in ranks:
        install(place, lambda: ask(config, how))
    os.environ[JOB_STOP_FILE] = str(Path(config).parent / "job.stop")
    raise SystemExit(pretrain("--config", config))


def ask(config: str, how: str) -> None:
    if how in ("file", "job file"):
        (Path(config).parent / "run" / STOP_FILE if how == "file" else Path(os.environ[JOB_STOP_FILE])).touch()
        # A look may have been a moment ago.
        time.sleep(1.1)
        return
    for name in how.split():
        os.kill(os.getpid(), getattr(signal, name))


def install(place: str, act: Callable[[], None]) -> None:
    from slope_dist.checkpoint import writer
    from slope_dist.training import trainer

    if place.startswith("step"):
        number = int(place.split()[1])
        watch_engines(lambda event, engine, step: act() if (event, step) == ("before step", number) else None)
    elif place == "start":
        watch_engines(lambda event, engine, step: act() if event == "built" else None)
    elif place == "evaluation":
        evaluate = trainer.evaluate_mixture

        def asked(*arguments: Any, **keywords: Any) -> Any:
            act()
            return evaluate(*arguments, **keywords)

        trainer.evaluate_mixture = asked
    elif place == "save":
        save = writer.save

        def slow(*arguments: Any, **keywords: Any) -> Any:
            act()
            return save(*arguments, **keywords)

        writer.save = slow


def whole_run(config: str) -> None:
    raise SystemExit(pretrain("--config", config))


def run(function: Callable, ranks: int, *arguments: Any) -> list[Outcome]:
    return end_ranks(function, ranks, *arguments, process_group=False)


def end_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run/end.json").read_text())


def numbers(run: Path) -> list[Any]:
    rows = [*step_rows(run), *evaluation_rows(run)]
    return [[row.get(key) for key in ("step", "loss", "grad_norm", "lr", "phase", "eval_loss")] for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    made: dict[int, Path] = {}

    def make(ranks: int) -> Path:
        if ranks not in made:
            made[ranks] = tmp_path_factory.mktemp("uninterrupted")
            outcomes = run(whole_run, ranks, str(write_config(made[ranks], corpus, **CHANGES)))
            assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes[0].errors
            end = end_of(made[ranks])
            assert (end["how"], end["step"], end["exit_code"]) == ("finished", STEPS, 0)
        return made[ranks] / "run"

    return make


def stopped_while_stopping() -> list[str]:
    """What is raised where a request comes before the first step, and another one where the first is handled."""
    stopper = Stopper(ALONE)
    stopper.listen()
    raised = []
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(1)
    except StopNow as first:
        raised.append(str(first))
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        except StopNow as second:
            raised.append(str(second))
    return raised


def test_a_second_request_does_not_hit_what_handles_the_first() -> None:
    [outcome] = end_ranks(stopped_while_stopping, 1, process_group=False)
    assert outcome.result == ["SIGUSR1"], outcome.errors


def signalled_while_it_imports(config: str, folder: str) -> None:
    """The early signal, and the file that comes before it, while the entry point's modules are on their way."""
    import sys

    os.environ[JOB_STOP_FILE], os.environ[END_FILE] = f"{folder}/job.stop", f"{folder}/job.json"

    class Importing:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "slope_dist.training.entry":
                Path(os.environ[JOB_STOP_FILE]).touch()
                os.kill(os.getpid(), signal.SIGUSR1)

    sys.modules.pop("slope_dist.training.entry", None)
    sys.meta_path.insert(0, Importing())  # type: ignore[arg-type]
    raise SystemExit(pretrain("--config", config))


def test_a_signal_while_modules_are_imported_is_found_afterwards(corpus: Path, tmp_path: Path) -> None:
    [outcome] = run(signalled_while_it_imports, 1, str(write_config(tmp_path, corpus, **CHANGES)), str(tmp_path))
    assert outcome.code == EXIT_STOPPED, outcome.errors
    end = json.loads((tmp_path / "job.json").read_text())
    assert (end["how"], end["cause"], end["step"]) == ("stopped", "SIGUSR1", 0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("place", "how", "ranks", "of", "done", "reason"),
    [
        ("step 2", "SIGTERM", [0], 1, 2, "SIGTERM"),
        ("step 3", "SIGINT", [0], 1, 3, "SIGINT"),
        ("evaluation", "SIGUSR1", [0], 1, 2, "SIGUSR1"),
        ("save", "SIGTERM SIGTERM", [0], 1, None, "SIGTERM"),
        ("step 4", "file", [0], 1, 4, "the file stop"),
        ("step 4", "job file", [0], 2, 4, "its job script"),
        ("step 2", "SIGUSR1", [1], 2, 2, "SIGUSR1"),
        ("step 5", "SIGTERM", [0, 1], 2, 5, "SIGTERM"),
        ("evaluation", "SIGTERM", [1], 2, 2, "SIGTERM"),
    ],
)
def test_a_run_asked_to_stop_saves_leaves_and_goes_on(
    place: str,
    how: str,
    ranks: list[int],
    of: int,
    done: int | None,
    reason: str,
    uninterrupted: Callable,
    corpus: Path,
    tmp_path: Path,
) -> None:
    config = str(write_config(tmp_path, corpus, **CHANGES))
    outcomes = run(asked_to_stop, of, config, place, how, ranks)
    assert [outcome.code for outcome in outcomes] == [EXIT_STOPPED] * of, outcomes[0].errors
    end = end_of(tmp_path)
    # A save begins beside the step after it, so the run stops after either.
    done = end["step"] if done is None else done
    assert done < STEPS
    assert end | {"how": "stopped", "step": done, "cause": reason, "exit_code": EXIT_STOPPED} == end
    assert end["checkpoint"] == f"step-0000000{done}" == newest(tmp_path / "run").path.name
    assert f"stopped by {reason} after step {done} of {STEPS}" in outcomes[0].output
    assert "go on with:" in outcomes[0].output
    assert not (tmp_path / "run" / STOP_FILE).exists()
    resumed = run(whole_run, of, config)
    assert [outcome.code for outcome in resumed] == [0] * of, resumed[0].errors
    assert numbers(tmp_path / "run") == numbers(uninterrupted(of))
    mine, other = newest(tmp_path / "run").manifest, newest(uninterrupted(of)).manifest
    assert {name: file.sha256 for name, file in mine.files.items()} == {
        name: file.sha256 for name, file in other.files.items()
    }


def asked_by_file_and_signal(config: str) -> None:
    install("step 2", lambda: [ask(config, how) for how in ("file", "SIGUSR1")])
    raise SystemExit(pretrain("--config", config))


def test_a_stop_file_stays_until_it_is_the_reason(corpus: Path, tmp_path: Path) -> None:
    """A job that makes room is requeued: who asked for the end by the file would see it train on."""
    config = str(write_config(tmp_path, corpus, **CHANGES))
    for function, cause, stays in ((asked_by_file_and_signal, "SIGUSR1", True), (whole_run, "the file stop", False)):
        [outcome] = run(function, 1, config)
        assert outcome.code == EXIT_STOPPED, outcome.errors
        assert (end_of(tmp_path)["cause"], (tmp_path / "run" / STOP_FILE).exists()) == (cause, stays)
        assert end_of(tmp_path)["step"] == 2


@pytest.mark.parametrize(("name", "ranks", "verdict"), [("SIGTERM", [0], "stop"), ("SIGUSR1", [1], "go on")])
def test_a_signal_before_the_first_step_ends_all_ranks(
    name: str, ranks: list[int], verdict: str, corpus: Path, tmp_path: Path
) -> None:
    config = str(write_config(tmp_path, corpus, **CHANGES))
    outcomes = run(asked_to_stop, 2, config, "start", name, ranks)
    assert outcomes[ranks[0]].code == EXIT_STOPPED, outcomes[ranks[0]].errors
    assert all(outcome.code != 0 for outcome in outcomes)
    said = "".join(outcome.errors for outcome in outcomes)
    assert said.count(f"stopped by {name} before the first step") == 1 and "Traceback" not in said
    end = end_of(tmp_path)
    assert (end["how"], end["cause"]) == ("stopped", name)
    assert decide(end, EXIT_STOPPED, "running", [], most=0).verdict == verdict
    assert [outcome.code for outcome in run(whole_run, 2, config)] == [0, 0]


def test_a_second_ctrl_c_ends_the_process(corpus: Path, tmp_path: Path) -> None:
    config = str(write_config(tmp_path, corpus, **CHANGES))
    [outcome] = run(asked_to_stop, 1, config, "step 2", "SIGINT SIGINT", [0])
    assert outcome.code == 130 and "Traceback" not in outcome.errors
    assert end_of(tmp_path) | {"how": "failed", "cause": "interrupted", "exit_code": 130} == end_of(tmp_path)


def cannot_save(config: str, step: int, failures: int, how: dict[str, str]) -> None:
    """The disk is out of order `failures` times from the save of `step` on; asked to stop by `how` at each of some."""
    from slope_dist.checkpoint import saver, writer

    save = writer.save
    failed = 0

    def failing(*arguments: Any, **keywords: Any) -> Any:
        nonlocal failed
        if arguments[1] < step or failed == failures:
            return save(*arguments, **keywords)
        failed += 1
        ask(config, how.get(str(failed), ""))
        raise CheckpointError(f"step {arguments[1]} was not saved: Input/output error")

    writer.save = failing
    saver.LONGEST_WAIT = 0.01
    raise SystemExit(pretrain("--config", config))


def test_a_run_outlasts_an_outage_at_its_last_step(corpus: Path, tmp_path: Path) -> None:
    config = str(write_config(tmp_path, corpus, **CHANGES))
    [outcome] = run(cannot_save, 1, config, STEPS, 20, {})
    assert outcome.code == 0, outcome.errors
    assert newest(tmp_path / "run").step == STEPS
    lines = [line for line in outcome.output.splitlines() if "was not saved" in line]
    assert len(lines) == 20 and lines[-1].endswith("trying again in 0.0s, and so on for 10m00s")


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_stop_leaves_less_time_for_the_last_save(when: str, corpus: Path, tmp_path: Path) -> None:
    config = str(write_config(tmp_path, corpus, **CHANGES | {"checkpoint__interval": 0}))
    if when == "before":
        [outcome] = run(stopped_and_cannot_save, 1, config)
        end = "stopped"
    else:
        [outcome] = run(cannot_save, 1, config, STEPS, 20, {"8": "SIGTERM"})
        end = "finished"
    assert end_of(tmp_path)["how"] == end, outcome.errors
    lines = [line for line in outcome.output.splitlines() if "was not saved" in line]
    assert len(lines) == 20 and lines[-1].endswith("and so on for 2m00s")
    # The first attempt of the last step is made beside training.
    assert [line.endswith("for 10m00s") for line in lines].count(True) == (0 if when == "before" else 6)


def stopped_and_cannot_save(config: str) -> None:
    install("step 2", lambda: ask(config, "SIGTERM"))
    cannot_save(config, 1, 20, {})


def test_a_second_ctrl_c_ends_the_last_save(corpus: Path, tmp_path: Path) -> None:
    config = str(write_config(tmp_path, corpus, **CHANGES))
    [outcome] = run(cannot_save, 1, config, STEPS, 10**9, {"8": "SIGINT", "12": "SIGINT"})
    assert outcome.code == 130 and "Traceback" not in outcome.errors
    assert newest(tmp_path / "run").step == 3


@pytest.fixture
def stopper() -> Any:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    made = Stopper(ALONE)
    made.listen()
    yield made
    made.close()
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_signal_is_an_exception_first_and_a_note_later(stopper: Stopper, tmp_path: Path) -> None:
    with pytest.raises(StopNow, match="SIGUSR1"):
        os.kill(os.getpid(), signal.SIGUSR1)
    again = Stopper(ALONE)
    again.listen()
    again.defer(tmp_path)
    os.kill(os.getpid(), signal.SIGTERM)
    assert again.agreed() == "SIGTERM"
    again.close()


def test_a_request_of_before_the_handlers_is_heard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.stop").touch()
    monkeypatch.setenv(JOB_STOP_FILE, str(tmp_path / "job.stop"))
    stopper = Stopper(ALONE)
    try:
        with pytest.raises(StopNow, match="SIGUSR1"):
            stopper.listen()
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        stopper.close()


def test_forked_children_do_not_react(stopper: Stopper, tmp_path: Path) -> None:
    stopper.defer(tmp_path)
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0 if stopper.agreed() == "" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert stopper.agreed() == ""


def test_a_file_server_in_trouble_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_LOOK_EVERY", 0.0)
    monkeypatch.setenv(JOB_STOP_FILE, str(tmp_path / "job.stop"))
    stopper = Stopper(ALONE)
    stopper.defer(tmp_path)
    (tmp_path / STOP_FILE).touch()

    def stale(*arguments: Any, **keywords: Any) -> Any:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stale)
        assert stopper.agreed() == ""
    assert stopper.agreed() == "the file stop"
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", stale)
        stopper.obeyed("the file stop")
    stopper.obeyed("the file stop")
    assert not (tmp_path / STOP_FILE).exists()


def test_the_end_of_the_launcher_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_LOOK_EVERY", 0.0)
    launched = Stopper(Environment(0, 1, 0, 1, "deepspeed or torchrun"))
    launched.defer(tmp_path)
    by_hand = Stopper(ALONE)
    by_hand.defer(tmp_path)
    assert launched.agreed() == ""
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert launched.agreed() == "the end of its launcher"
    assert by_hand.agreed() == "", "a shell may go while its job stays"
