"""Claim: a job goes on after a part that was to make room or failed, at most so often and not without progress; never
after one that is finished, refused, cancelled, or stopped by somebody; and it says why in one line.

Run: pytest tests/cluster/test_requeue.py
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slope_dist.cluster.requeue import Part, decide, main, read_journal
from slope_dist.errors import EXIT_BAD_INPUT, EXIT_STOPPED
from slope_dist.training.stopping import REASONS

LOST = "rank 1 was lost"


def end(how: str, step: int | None = 10, cause: str | None = None, code: int | None = None) -> dict[str, Any]:
    """What a run writes, with a checkpoint of `step`."""
    checkpoint = None if step is None else f"step-{step:08d}"
    return {"how": how, "step": step or 0, "cause": cause, "exit_code": code, "checkpoint": checkpoint}


def chain(*ends: dict[str, Any] | None, most: int = 5) -> list[Part]:
    """The decisions after parts that ended so, one after the other."""
    parts: list[Part] = []
    for each in ends:
        parts.append(decide(each, 1, "running", parts, most))
    return parts


@pytest.mark.parametrize(
    ("ended", "code", "job", "verdict", "said"),
    [
        (end("finished", code=0), 0, "running", "done", "finished after step 10"),
        # A launcher may fail after the run, and a finished run is finished even for a job that was cancelled.
        (end("finished", code=0), 1, "ending", "done", "finished after step 10"),
        # `--dry-run`, which writes nothing.
        (None, 0, "running", "done", "nothing was left to do"),
        (end("failed", cause="no corpus", code=EXIT_BAD_INPUT), 1, "running", "give up", "would be again: no corpus"),
        (None, EXIT_BAD_INPUT, "running", "give up", "could not be started (exit code 2)"),
        (None, 127, "running", "give up", "could not be started (exit code 127)"),
        (
            end("stopped", cause="SIGUSR1", code=EXIT_STOPPED),
            75,
            "running",
            "go on",
            "stopped by SIGUSR1 after step 10",
        ),
        (end("stopped", cause="its job script", code=EXIT_STOPPED), 1, "running", "go on", "by its job script"),
        (end("stopped", cause="the file stop", code=EXIT_STOPPED), 75, "running", "stop", "as somebody asked for"),
        (end("stopped", cause="SIGINT", code=EXIT_STOPPED), 75, "running", "stop", "as somebody asked for"),
        (end("stopped", cause="SIGTERM", code=EXIT_STOPPED), 75, "running", "stop", "as somebody asked for"),
        (end("stopped", cause="SIGTERM", code=EXIT_STOPPED), 75, "ending", "done", "cancelled or is out of time"),
        (end("stopped", cause="SIGTERM", code=EXIT_STOPPED), 75, "preempted", "go on", "preempted; the newest"),
        # Killed at the end of the time that preemption leaves.
        (end("running"), 137, "preempted", "go on", "preempted; the newest checkpoint is of step 10"),
        (end("running"), 137, "ending", "done", "cancelled or is out of time"),
        (end("failed", cause="no corpus", code=EXIT_BAD_INPUT), 2, "preempted", "give up", "would be again"),
        # A node has died.
        (end("failed", cause=LOST, code=1), 1, "requeued", "go on", "took the job back, as when a node fails"),
        (end("running"), 143, "requeued", "go on", "starts it again by itself; the newest checkpoint is of step 10"),
        (end("running"), 143, "held", "go on", "holds it until `scontrol release`"),
        (end("failed", cause=LOST, code=1), 1, "lost", "done", "a node failed, and SLURM does not requeue this job"),
        (end("finished", code=0), 1, "requeued", "done", "finished after step 10"),
    ],
)
def test_what_is_no_failure_of_the_run(
    ended: dict[str, Any] | None, code: int, job: str, verdict: str, said: str
) -> None:
    part = decide(ended, code, job, [], most=0)
    assert part.verdict == verdict and said in part.reason and not part.counted


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        (end("failed", cause=LOST, code=1), f"the run failed after step 10: {LOST}"),
        (end("running"), "the run was killed without a word (exit code 1)"),
        (end("stopped", cause="the end of its launcher", code=EXIT_STOPPED), "the end of its launcher"),
        (None, "ended before it could say why (exit code 1)"),
        ({}, "ended before it could say why (exit code 1)"),
    ],
)
def test_a_failure_goes_on_and_is_counted(ended: dict[str, Any] | None, said: str) -> None:
    [part] = chain(ended)
    assert part.verdict == "go on" and part.counted and said in part.reason and "failure 1 of at most 5" in part.reason
    [part] = chain(ended, most=0)
    assert part.verdict == "give up" and "failed 1 times, and may 0 times" in part.reason


def test_every_reason_to_stop_is_known() -> None:
    verdicts = {cause: decide(end("stopped", cause=cause), 75, "running", [], 5).verdict for cause in REASONS if cause}
    assert verdicts.pop("the end of its launcher") == "go on", "counted, see above"
    assert [cause for cause, verdict in verdicts.items() if verdict == "go on"] == ["its job script", "SIGUSR1"]


def test_failures_are_limited_however_much_is_done_between_them() -> None:
    parts = chain(*(end("failed", step, LOST, 1) for step in range(10, 80, 10)), most=3)
    assert [part.verdict for part in parts[:4]] == ["go on"] * 3 + ["give up"]
    assert "failed 4 times, and may 3 times; the newest checkpoint is of step 40" in parts[3].reason


def test_failures_without_a_new_checkpoint_are_limited_to_two_in_a_row() -> None:
    failed, again, later = (end("failed", step, LOST, 1) for step in (10, 10, 20))
    assert [part.verdict for part in chain(failed, again, again)] == ["go on", "go on", "give up"]
    # Progress between them starts the count anew.
    assert [part.verdict for part in chain(failed, again, later, later, later)][2:] == ["go on", "go on", "give up"]
    nothing = end("failed", None, "no", 1)
    assert [part.verdict for part in chain(nothing, nothing)] == ["go on", "give up"]
    assert [part.verdict for part in chain(None, None)] == ["go on", "give up"]
    assert "2 failures in a row have left no new checkpoint; there is no checkpoint yet" in chain(None, None)[1].reason


def test_a_refusal_that_may_pass_is_a_failure_like_others() -> None:
    """A folder that is still in use by the part before."""
    busy = end("failed", None, "run.folder x is in use by process 7", EXIT_BAD_INPUT) | {"temporary": True}
    saved = end("failed", 20, "rank 1 was lost", 1)
    assert [part.verdict for part in chain(busy, saved, busy, saved | {"checkpoint": "step-00000030"})] == ["go on"] * 4
    assert [part.verdict for part in chain(busy, busy)] == ["go on", "give up"]
    assert chain(busy | {"temporary": False})[0].verdict == "give up"


REFUSED = end("failed", None, "4 processes have no GPU each", EXIT_BAD_INPUT) | {"trained": 0}


def test_a_refusal_after_the_chain_has_run_is_a_failure_like_others() -> None:
    """A GPU that has fallen off, a corpus that cannot be read any more."""
    saved = end("stopped", 20, "SIGUSR1", EXIT_STOPPED)
    parts = chain(saved, REFUSED, saved | {"checkpoint": "step-00000030"}, REFUSED, REFUSED)
    assert [part.verdict for part in parts] == ["go on"] * 4 + ["give up"]
    assert [part.counted for part in parts] == [False, True, False, True, True]
    assert "refused, though it has run before, as if a machine or a file system failed: 4 proc" in parts[1].reason
    assert "failure 1 of at most 5" in parts[1].reason and "2 failures in a row" in parts[4].reason
    assert chain(saved, REFUSED, most=0)[1].verdict == "give up"
    # A part that was cut short before its first checkpoint has not shown that its input is in order.
    assert chain(end("running", None), REFUSED)[1].verdict == "give up"


def test_a_refusal_counts_steps_that_the_part_itself_has_trained() -> None:
    midway = end("failed", 20, "cannot read corpus at byte 7: Input/output error", EXIT_BAD_INPUT)
    assert chain(midway | {"trained": 3})[0].verdict == "go on" and chain(midway | {"trained": 3})[0].counted
    # It went on from an older job's checkpoint, and was refused before its first step.
    assert chain(midway | {"trained": 0})[0].verdict == "give up"
    assert chain(midway | {"trained": "3"})[0].verdict == "give up"


def test_a_program_that_is_gone_after_the_chain_has_run_may_come_back() -> None:
    saved = end("stopped", 20, "SIGUSR1", EXIT_STOPPED)
    earlier = chain(saved)
    for code in (EXIT_BAD_INPUT, 126, 127):
        part = decide(None, code, "running", earlier, 5)
        assert part.verdict == "go on" and part.counted and "though it could before" in part.reason
    assert decide(None, 127, "ending", earlier, 5).verdict == "done"
    assert decide(REFUSED, 1, "preempted", earlier, 5).verdict == "go on"


def test_making_room_is_not_counted() -> None:
    stopped = [end("stopped", 10 * step, "SIGUSR1", EXIT_STOPPED) for step in range(1, 30)]
    assert {part.verdict for part in chain(*stopped, most=0)} == {"go on"}
    # Not even twice before the first step; but it is no progress either.
    early = end("stopped", None, "SIGUSR1", EXIT_STOPPED)
    found = chain(early, early, early, early)
    assert [part.verdict for part in found] == ["go on"] * 3 + ["give up"] and "too short for a start" in found[
        3
    ].reason
    again = [end("stopped", 7, "SIGUSR1", EXIT_STOPPED)] * 4
    assert [part.verdict for part in chain(*again)] == ["go on"] * 4, "the first of them left a checkpoint"
    assert [part.verdict for part in chain(early, early, None)] == ["go on"] * 3


def test_progress_of_a_run_that_was_killed_is_seen_in_its_folder(tmp_path: Path) -> None:
    killed = end("running", 10) | {"folder": str(tmp_path)}
    for name in ("step-00000010", "step-00000030", "step-00000040.tmp-1", "step-x", "latest"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    [part] = chain(killed)
    assert part.checkpoint == 30
    assert chain(end("running", 10) | {"folder": str(tmp_path / "gone")})[0].checkpoint == 10


def test_a_damaged_checkpoint_that_stays_is_neither_progress_nor_in_its_way(tmp_path: Path) -> None:
    ends = []
    for step in (4100, 4200, 4300, 4400, 4500):
        for name in (f"step-{step:08d}", "step-00005000"):
            (tmp_path / str(step) / "checkpoints" / name).mkdir(parents=True)
        of_folder = {"folder": str(tmp_path / str(step)), "damaged": ["step-00005000"]}
        ends.append(end("stopped", step, "SIGUSR1", EXIT_STOPPED) | of_folder)
    # Before it was damaged.
    first = end("stopped", 5000, "SIGUSR1", EXIT_STOPPED)
    parts = chain(first, *ends)
    assert [part.checkpoint for part in parts] == [5000, 4100, 4200, 4300, 4400, 4500]
    assert {part.verdict for part in parts} == {"go on"} and "of step 4500" in parts[-1].reason
    failed = [each | {"how": "failed", "cause": LOST} for each in ends]
    assert {part.verdict for part in chain(first, *failed)} == {"go on"}
    # A part that was killed without a word, or hung, has not said what it saved.
    killed = ends[0] | {"how": "running", "checkpoint": "step-00005000"}
    assert chain(killed)[0].checkpoint == 4100
    assert chain(killed | {"damaged": None})[0].checkpoint == 5000
    # Where nothing more is saved it ends.
    assert [part.verdict for part in chain(first, *[ends[0]] * 4)] == ["go on"] * 5
    assert chain(first, *[ends[0]] * 5)[-1].verdict == "give up"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder with the config of a run of 10 steps."""
    model = {
        "hidden_size": 64,
        "num_layers": 1,
        "num_heads": 4,
        "ffn_size": 64,
        "vocab_size": 512,
        "sequence_length": 8,
    }
    training = {"steps": 10, "global_batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-3}
    config = {"model": model, "data": {"folder": "x"}, "training": training, "run": {"folder": str(tmp_path / "run")}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "run").mkdir()
    return tmp_path


def before_words(job: Path) -> list[str]:
    return ["before", "--journal", str(job / "j"), "--end", str(job / "unknown"), "--"]


def before(job: Path, *more: str) -> int:
    return main([*before_words(job), "--config", str(job / "config.json"), *more])


def after(job: Path, content: str | None, code: int = 1, most: int = 5) -> int:
    path = job / "end"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    return main(["after", "--journal", str(job / "j"), "--end", str(path), "--code", str(code), "--most", str(most)])


def test_before_a_part(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert before(job) == 0
    for how, step, code in (("running", 10, 0), ("finished", 9, 0), ("stopped", 10, 0), ("finished", 10, 3)):
        (job / "run/end.json").write_text(json.dumps(end(how, step)))
        assert before(job) == code, how
    assert capsys.readouterr().out == f"done: the run in {job}/run is finished after step 10\n"
    # A longer run is not finished, and arguments that are not about it are left to the run.
    assert before(job, "--set", "training.steps=20", "--resume", "auto") == 0
    assert before(job, "--set", "training.steps=0") == EXIT_BAD_INPUT
    assert "training.steps: must be at least 1, not 0 (from --set)" in capsys.readouterr().err
    assert main([*before_words(job), "--no-config"]) == 0
    (job / "run/end.json").write_text("torn")
    assert before(job) == 0


@pytest.mark.parametrize(
    ("alternatives", "nodes", "used"),
    [
        ([], 3, 3),
        ([{"data": 1}], 8, 4),
        ([{"data": 1}], 3, 2),
        ([{"tensor": 2, "data": 1}], 3, 1),
        # None fits, which the run says.
        ([{"data": 1}], 1, 1),
    ],
)
def test_nodes_that_fit_a_layout(
    alternatives: list[Any], nodes: int, used: int, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((job / "config.json").read_text())
    config["parallel"] = {"tensor": 4, "data": 2, "alternatives": alternatives}
    (job / "config.json").write_text(json.dumps(config))
    assert main(["nodes", f"--nodes={nodes}", "--ranks=2", "--", "--config", str(job / "config.json")]) == 0
    assert capsys.readouterr().out == f"{used}\n"


@pytest.mark.parametrize(
    ("ended", "code"), [(end("failed", None, "no", 2), 4), (end("stopped", 5, "the file stop", 75), 5)]
)
def test_a_chain_that_has_ended_does_not_begin_again(job: Path, ended: dict[str, Any], code: int) -> None:
    assert after(job, json.dumps(ended)) == code
    assert before(job) == code


@pytest.mark.parametrize("ended", [end("failed", 5, LOST, 1), end("stopped", 5, "SIGUSR1", 75), end("finished", 5)])
def test_a_chain_that_has_not_ended_goes_on(job: Path, ended: dict[str, Any]) -> None:
    assert after(job, json.dumps(ended)) in (0, 3)
    assert before(job) == 0


def test_a_part_whose_script_was_killed_is_in_the_journal_before_the_next(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = job / "unknown"
    unknown.write_text(json.dumps(end("running", 10)))
    assert before(job) == 0
    assert "go on: the part before: SLURM took the job back" in capsys.readouterr().out
    [part] = read_journal(job / "j")
    assert (part.verdict, part.counted, part.checkpoint) == ("go on", False, 10)
    # So that a node without a GPU, after that, is not taken for a mistake.
    assert after(job, json.dumps(REFUSED)) == 0
    unknown.write_text(json.dumps(end("finished", 10)))
    assert before(job) == 0, "what the run's own folder says decides"
    unknown.write_text(json.dumps(end("stopped", 10, "the file stop", EXIT_STOPPED)))
    assert after(job, json.dumps(end("stopped", 10, "the file stop", EXIT_STOPPED))) == 5
    assert before(job) == 5, "nor does it begin a chain anew that has ended"


def test_a_refusal_whose_script_was_killed_ends_the_chain(job: Path) -> None:
    (job / "unknown").write_text(json.dumps(REFUSED))
    assert before(job) == before(job) == 4


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_config_that_cannot_be_read_for_now_is_left_to_the_run(
    number: int, job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Path, *arguments: Any) -> None:
        raise OSError(number, os.strerror(number), str(self))

    nodes = ["nodes", "--nodes=3", "--ranks=2", "--", "--config", str(job / "config.json")]
    monkeypatch.setattr(Path, "open", fail)
    assert before(job) == (EXIT_BAD_INPUT if number == errno.EACCES else 0)
    # Asked later, when the run is to start: it then says what is wrong, to whom counts it.
    assert main(nodes) == 0 and capsys.readouterr().out.endswith("3\n")


def test_a_config_that_is_gone_after_the_chain_has_run_is_left_to_the_run(job: Path) -> None:
    config = job / "config.json"
    content = config.read_text()
    config.unlink()
    assert before(job) == EXIT_BAD_INPUT
    config.write_text(content)
    assert after(job, json.dumps(end("stopped", 10, "SIGUSR1", EXIT_STOPPED))) == 0
    # One that is there and wrong does not heal.
    config.write_text(content[:100])
    assert before(job) == EXIT_BAD_INPUT
    config.unlink()
    assert before(job) == main(["nodes", "--nodes=3", "--ranks=2", "--", "--config", str(config)]) == 0
    # What the run then says is counted.
    assert after(job, json.dumps(REFUSED)) == 0
    assert [part.counted for part in read_journal(job / "j")] == [False, True]
    assert before(job) == 0 and after(job, json.dumps(REFUSED)) == before(job) == 4


def test_a_config_that_is_gone_with_the_node_of_a_part_that_ran_is_left_to_the_run(job: Path) -> None:
    (job / "config.json").unlink()
    (job / "unknown").write_text(json.dumps(end("running", 10)))
    assert before(job) == 0


def test_the_journal_keeps_each_part(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert after(job, json.dumps(end("failed", 5, "a\nb\x1b[31m", 1))) == 0
    with (job / "j").open("a") as file:
        file.write('{"verdict": "go on", "rea')
    for content in ("torn {", "[]", "\0", None):
        code = after(job, content)
    assert code == 4
    assert [part.verdict for part in read_journal(job / "j")] == ["go on", "go on", *["give up"] * 3]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(line.isprintable() for line in lines)


def test_a_journal_that_cannot_be_written_requeues_nothing(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (job / "j").mkdir()
    assert after(job, json.dumps(end("failed", 5, LOST, 1))) == EXIT_BAD_INPUT
    assert "error: " in capsys.readouterr().err


def test_the_program_starts_without_torch(job: Path) -> None:
    # A batch script asks it before each part, on a node that may be slow.
    code = "import sys, slope_dist.cluster.requeue; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
