"""tools/status.py: what it says of a run is so, whatever state its folder is in, and it disturbs and writes nothing.

Run: pytest tests/training/test_status.py
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from slope_dist.training import ending
from slope_dist.training.ending import Turn, write_end
from slope_dist.training.status import Observer, Status, lock_is_held
from slope_dist.training.status_metrics import RECENT, Metrics
from slope_dist.training.status_screen import facts
from tests.distributed import ROOT, end_ranks
from tests.programs import program
from tests.runs import STEPS, pretrain, rows_of, step_rows, watch_engines, write_config

TOOL = ROOT / "tools/status.py"
KILLED_AFTER = 5


def killed_run(config: str) -> None:
    """The entry point; the process is killed after a step that no checkpoint holds."""

    def watch(event: str, engine: Any, step: Any) -> None:
        if (event, step) == ("before step", KILLED_AFTER + 1):
            os.kill(os.getpid(), signal.SIGKILL)

    watch_engines(watch)
    pretrain("--config", config)


def whole_run(config: str) -> None:
    assert pretrain("--config", config) == 0


def slow_start(config: str) -> None:
    """The entry point, which stands still before a step until the test has looked."""

    def watch(event: str, engine: Any, step: Any) -> None:
        if (event, step) == ("before step", 3):
            while not Path(config).with_name("go on").exists():
                time.sleep(0.02)

    watch_engines(watch)
    assert pretrain("--config", config) == 0


@pytest.fixture(scope="module")
def folders(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run that was killed, as it then lay, and the same run after it has gone on to its end."""
    base = tmp_path_factory.mktemp("status")
    config = write_config(base, corpus, checkpoint__interval=2, evaluation__interval=4, watch__straggler_interval=0)
    assert [o.code for o in end_ranks(killed_run, 1, str(config), process_group=False)] == [-signal.SIGKILL]
    shutil.copytree(base / "run", base / "killed")
    outcome = end_ranks(whole_run, 1, str(config), process_group=False)[0]
    assert outcome.code == 0, outcome.errors
    return {"killed": base / "killed", "finished": base / "run"}


def look(folder: Path, **keywords: Any) -> Status:
    return Observer(folder).look(**keywords)


@pytest.fixture
def main(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, stdout and stderr of the command."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = program("status").main([str(argument) for argument in arguments])
        output, errors = capsys.readouterr()
        assert "Traceback" not in errors
        return code, output, errors

    return run


def test_a_killed_run(folders: dict[str, Path]) -> None:
    status = look(folders["killed"])
    assert (status.state, status.step, status.steps) == ("killed", KILLED_AFTER, STEPS)
    assert status.checkpoint is not None and status.checkpoint.step == 4 and status.checkpoint.verified is None
    assert [part["how"] for part in status.parts] == [None] and status.restarts == 0
    assert any("killed without a word" in line for line in status.warnings)
    assert status.evaluation is not None and status.evaluation["step"] == 4
    assert (status.phase, status.first_adapter_step) == ("sparse", 6)
    assert status.eta_seconds is None and status.exit_code is None
    # Not until now: nobody runs. It has been dead for at least as long as the second part took.
    assert status.goodput is not None and status.goodput == look(folders["killed"], now=time.time() + 1e6).goodput


def test_a_lock_of_another_machine_may_not_be_seen_here(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["killed"], tmp_path / "run")
    end = json.loads((folder / "end.json").read_text())
    (folder / "end.json").write_text(json.dumps(end | {"host": "another"}))
    written = step_rows(folder)[-1]["time"]
    recent = look(folder, now=written + 30)
    assert recent.state == "unclear" and recent.eta_seconds and recent.warnings == []
    # Where no rows come either it is dead.
    assert look(folder, now=written + 1e5).state == "killed"


def test_a_finished_run(folders: dict[str, Path]) -> None:
    folder = folders["finished"]
    status = look(folder)
    assert (status.state, status.step, status.exit_code, status.restarts) == ("finished", STEPS, 0, 1)
    rows = step_rows(folder)
    assert status.loss == rows[-1]["loss"] and status.tokens == rows[-1]["tokens"]
    assert status.mean_loss == pytest.approx(sum(row["loss"] for row in rows) / STEPS) and status.mean_of == STEPS
    assert [(part["how"], part["step"]) for part in status.parts] == [(None, 0), ("finished", 4)]
    assert status.checkpoint is not None and status.checkpoint.step == STEPS
    files = [path for path in (folder / "checkpoints" / status.checkpoint.name).iterdir()]
    assert status.checkpoint.bytes == sum(path.stat().st_size for path in files)
    assert status.warnings == []
    assert status.goodput is not None and 0 < status.goodput.share < 1
    expected = sum(row["tokens"] / row["step"] / row["tokens_per_second"] for row in rows)
    assert status.goodput.step_seconds == pytest.approx(expected)
    assert status.goodput == look(folder, now=time.time() + 1e6).goodput
    shown = facts(status)
    assert shown["restarts"] == "1; from step 0: killed" and shown["step"].startswith(f"{STEPS} of {STEPS} (100.0 %)")


def test_a_run_that_goes_on(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, training__steps=4)
    run = tmp_path / "run"
    # A process beside this one, which asks while it stands still.
    asking = subprocess.Popen(
        [sys.executable, "-c", ASK, str(run), str(tmp_path / "go on")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    outcome = end_ranks(slow_start, 1, str(config), process_group=False)[0]
    output, _ = asking.communicate(timeout=60)
    assert outcome.code == 0 and asking.returncode == 0, (outcome.errors, output)
    seen = json.loads(output)
    assert (seen["state"], seen["step"], seen["steps"], seen["restarts"]) == ("running", 2, 4, 0)
    assert seen["eta_seconds"] == pytest.approx(2 * seen["seconds_per_step"]) and seen["quiet_seconds"] < 60
    assert seen["host"] and seen["pid"] and seen["warnings"] == []
    assert look(run).state == "finished"


ASK = """
import subprocess, sys, time
from pathlib import Path
run, go_on = Path(sys.argv[1]), Path(sys.argv[2])
end = time.monotonic() + 50
metrics = run / "metrics.jsonl"
while time.monotonic() < end and not (metrics.exists() and '"step": 2' in metrics.read_text()):
    time.sleep(0.05)
print(subprocess.run([sys.executable, "tools/status.py", str(run), "--json"], capture_output=True, text=True).stdout)
go_on.touch()
"""


def test_who_asks_neither_writes_nor_imports_torch(folders: dict[str, Path]) -> None:
    folder = folders["finished"]

    def everything() -> dict[str, tuple[int, int, int]]:
        return {
            str(path): (found.st_ino, found.st_size, found.st_mtime_ns)
            for path in [folder, *folder.rglob("*")]
            for found in [path.stat()]
        }

    before = everything()
    code = "import sys; sys.argv = ['status', sys.argv[1]]; import runpy\n"
    code += "try: runpy.run_path('tools/status.py', run_name='__main__')\n"
    code += "except SystemExit as end: print('exit', end.code, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.endswith("exit 0 False\n"), done.stdout + done.stderr
    assert everything() == before


def test_a_job_may_start_while_somebody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / ".lock").touch()
    asking = os.open(tmp_path / ".lock", os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH)
    # As if many asked at the very instant: it waits, and is not refused.
    assert lock_is_held(tmp_path / ".lock") is False
    monkeypatch.setattr(ending.time, "sleep", lambda _: os.close(asking))
    turn = Turn(tmp_path)
    turn.take()
    assert turn.warning is None and lock_is_held(tmp_path / ".lock") is True
    assert look(tmp_path).state == "starting"
    write_end(tmp_path, "running", step=0, exit_code=None, cause=None, ranks=2)
    status = look(tmp_path)
    assert (status.state, status.pid, status.ranks) == ("running", os.getpid(), 2)
    turn.release()
    assert look(tmp_path).state == "killed"
    for how in ("finished", "stopped", "failed"):
        write_end(tmp_path, how, step=3, exit_code=75, cause="SIGTERM", ranks=2)
        assert look(tmp_path).state == how
    assert facts(look(tmp_path))["why"] == "SIGTERM (exit code 75)"


def row(step: int, seconds: float = 0.5, **changes: Any) -> dict[str, Any]:
    tokens = 100
    return {
        "step": step,
        "loss": 2.0,
        "tokens": step * tokens,
        "tokens_per_second": tokens / seconds,
        "phase": "sparse",
        "time": 1000.0 + step,
    } | changes


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    partial = folder / ".partial"
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(partial, folder / "metrics.jsonl")


def history(how: str, second: int, step: int = 0) -> str:
    at = time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime(second))
    return json.dumps({"how": how, "time": at, "step": step}) + "\n"


def test_goodput_is_time_in_steps_that_were_kept_over_wall_time(tmp_path: Path) -> None:
    # From 1000 s on; steps 5 to 8 were lost and done again; step 3 was skipped.
    (tmp_path / "history.jsonl").write_text(history("running", 1000) + history("running", 1040, step=4))
    rows = [row(step) for step in range(1, 11)]
    rows[2]["skipped"] = "non-finite"
    write_rows(tmp_path, rows)
    (tmp_path / "end.json").write_text(history("finished", 1100, step=10))
    goodput = look(tmp_path, now=5000.0).goodput
    assert goodput is not None
    assert (goodput.step_seconds, goodput.wall_seconds, goodput.share) == (9 * 0.5, 100.0, 0.045)
    # Of a run that goes on, until now; of one that was killed, until its last sign of life.
    (tmp_path / "end.json").write_text(history("running", 1040))
    killed = look(tmp_path, now=5000.0)
    assert killed.state == "killed" and killed.goodput is not None and killed.goodput.wall_seconds == 10.0
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        running = look(tmp_path, now=5000.0)
    assert running.state == "running" and running.goodput is not None and running.goodput.wall_seconds == 4000.0
    assert running.quiet_seconds == 5000.0 - 1040.0
    assert any(line.startswith("no step for 1h06m; the last ones took 0.5s each") for line in running.warnings)
    assert any(line.startswith("1 steps were skipped") for line in running.warnings)


def test_rows_that_come_are_added_to_those_that_were_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.read()
    assert not metrics.steps
    write_rows(tmp_path, [row(1), row(2)])
    metrics.read()
    assert metrics.step_seconds == 1.0
    whole = json.dumps(row(3)) + "\n"
    for part in (whole[:1], whole[1:10], whole[10:-1]):
        with path.open("a") as file:
            file.write(part)
        metrics.read()
        assert len(metrics.steps) == 2 and metrics.unreadable == 0
    with path.open("a") as file:
        file.write(whole[-1:])
    metrics.read()
    assert metrics.last("step") == 3 and metrics.step_seconds == 1.5
    # A job that went on after step 1 has put another file in its place.
    write_rows(tmp_path, [row(1), row(2, seconds=2.0)])
    metrics.read()
    assert metrics.last("step") == 2 and metrics.step_seconds == 2.5
    write_rows(tmp_path, [row(step) for step in range(1, 3 * RECENT)])
    metrics.read()
    assert len(metrics.steps) == RECENT and metrics.step_seconds == pytest.approx(0.5 * (3 * RECENT - 1))


def test_what_the_watch_and_the_saver_said_is_shown_until_it_is_over(tmp_path: Path) -> None:
    slow = {"rank": 3, "host": "n1", "what": "compute", "slow": True, "score": 0.5}
    first = {"tensor": "a.bias", "kind": "weight", "ranks": [1], "hosts": ["n1"], "copies": 4}
    rows = [
        row(1),
        {"step": 1, "straggler": slow},
        {"step": 1, "drift": {"tensors": 2, "shown": [first], "last_equal_step": None}},
        {"step": 1, "save_problem": "no space left"},
    ]
    write_rows(tmp_path, rows)
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch/hang-1.json").touch()
    warnings = "\n".join(look(tmp_path).warnings)
    assert "since step 1 rank 3 on n1 is slow in compute: score 0.5" in warnings
    assert "copies of 2 tensors differ, such as weight a.bias on ranks [1] (['n1'])" in warnings
    assert "at step 1: no space left" in warnings and "watch/hang-1.json" in warnings
    rows += [
        {"step": 2, "straggler": slow | {"slow": False}},
        {"step": 2, "drift": {"tensors": 0, "shown": [], "last_equal_step": 1}},
        {"step": 2, "checkpoint": "there"},
    ]
    write_rows(tmp_path, rows)
    assert look(tmp_path).warnings == [f"report of a hang: {tmp_path}/watch/hang-1.json"]


BAD_JSON = [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"how": 1, "time": {}, "pid": "x"}', b"[" * 100_000]
BAD_JSON += [b'{"step": NaN}']
BAD_JSON += [b'{"step": 1, "loss": {}, "straggler": {"slow": true}}\n{"step": 1, "drift": {"tensors": 1}}\n']
BAD_ROWS = [{"step": "7"}, {"tokens": None}, {"loss": "x"}, {"tokens_per_second": 0}, {"time": []}, {"phase": 3}]


@pytest.mark.parametrize("content", BAD_JSON, ids=range(len(BAD_JSON)))
@pytest.mark.parametrize("name", ["config.json", "end.json", "history.jsonl", "metrics.jsonl", ".lock"])
def test_a_folder_may_hold_anything(
    folders: dict[str, Path], tmp_path: Path, main: Callable[..., tuple[int, str, str]], name: str, content: bytes
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for path in folders["finished"].iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    (folder / name).write_bytes(content)
    assert main(folder)[0] == 0
    code, output, _ = main(folder, "--json")
    assert code == 0 and isinstance(json.loads(output)["warnings"], list)
    (folder / name).unlink()
    assert main(folder)[0] == 0
    os.mkfifo(folder / name)
    assert main(folder)[0] == 0


@pytest.mark.parametrize("fields", BAD_ROWS)
def test_a_row_may_hold_anything(tmp_path: Path, main: Callable[..., tuple[int, str, str]], fields: dict) -> None:
    write_rows(tmp_path, [row(1), row(2) | fields])
    code, output, errors = main(tmp_path, "--json")
    assert (code, errors) == (0, "") and json.loads(output)["steps"] is None


@pytest.mark.parametrize("extra", [[], ["--json"], ["--verify"], ["--follow", "1"]])
def test_a_bad_folder_is_one_line(tmp_path: Path, main: Callable[..., tuple[int, str, str]], extra: list[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder in (tmp_path / "none", tmp_path, file, "a\0b"):
        code, output, errors = main(folder, *extra)
        assert (code, output, errors.count("\n")) == (2, "", 1) and errors.startswith("error: ")


@pytest.mark.parametrize("arguments", [[], ["--follow", "0"], ["--follow", "nan"], ["--follow", "x"], ["--wat"]])
def test_a_bad_command_line_is_one_line(
    folders: dict[str, Path], main: Callable[..., tuple[int, str, str]], arguments: list[str]
) -> None:
    code, output, errors = main(*([folders["finished"]] if arguments else []), *arguments)
    assert (code, output, errors.count("\n")) == (2, "", 1) and errors.startswith("error: ")


def test_only_verify_reads_the_bytes(
    folders: dict[str, Path], tmp_path: Path, main: Callable[..., tuple[int, str, str]]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(folders["finished"], folder)
    assert "verifies" in main(folder, "--verify")[1]
    path = next((folder / f"checkpoints/step-{STEPS:08d}").glob("*.weights.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "complete by its files' sizes" in main(folder)[1]
    code, output, _ = main(folder, "--verify")
    assert code == 0 and "DOES NOT VERIFY" in output and "does not verify" in output
    path.write_bytes(content[:-1])
    status = look(folder)
    assert status.checkpoint is not None and status.checkpoint.step < STEPS
    assert any(f"step-{STEPS:08d} is not complete" in line for line in status.warnings)


def test_no_text_of_a_folder_makes_a_terminal_do_anything(
    tmp_path: Path, main: Callable[..., tuple[int, str, str]]
) -> None:
    write_rows(tmp_path, [row(1, phase="\x1b[31m[bold]red")])
    (tmp_path / "end.json").write_text(json.dumps({"how": "failed", "cause": "\x1b]0;title\x07\n[red]x", "host": "a"}))
    code, output, _ = main(tmp_path)
    assert code == 0 and "\x1b" not in output and "\x07" not in output
    assert "\\x1b[31m[bold]red" in output and "\\n[red]x" in output


def test_following_shows_what_comes(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(folders["finished"] / "config.json", folder)
    process = subprocess.Popen(
        [sys.executable, str(TOOL), str(folder), "--follow", "0.05", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        # Tests that are run in the background of a shell ignore it, and so would what they start.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    first = json.loads(process.stdout.readline())
    assert (first["state"], first["step"], first["steps"]) == ("not started", 0, STEPS)
    write_rows(folder, rows_of(folders["finished"]))
    while json.loads(process.stdout.readline())["step"] != STEPS:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    assert process.wait() == 130
