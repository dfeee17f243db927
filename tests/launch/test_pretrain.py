"""Claim: the entry point under each launcher gives the same run; bad input gives one line, exit code 2, no traceback.

Whole processes where a launcher is the claim; elsewhere ranks forked from a warm process, which call the same `main`.

Run: pytest tests/launch/test_pretrain.py
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slope_dist.lines import port_to_meet_at
from tests.distributed import ROOT, Outcome, end_ranks, skip_without_gpus
from tests.runs import evaluation_rows, make_corpus, newest, pretrain, step_rows, write_config

BIN = Path(sys.executable).parent
SCRIPT = "launch/pretrain.py"


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    """A command as a user gives it, with the environment's programs first in the path."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in drop}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        # A launcher's own children would outlive it.
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def entry_point(*arguments: str) -> None:
    """The entry point, whose exit code is the process's."""
    raise SystemExit(pretrain(*arguments))


def call(*arguments: str, ranks: int = 1) -> list[Outcome]:
    return end_ranks(entry_point, ranks, *arguments, process_group=False)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in step_rows(folder / "run")]


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.json and the finished run of plain python, two checkpoints of which are kept."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder, corpus, checkpoint__interval=4)
    done = launch(str(BIN / "python"), SCRIPT, "--config", str(config))
    assert done.returncode == 0, done.stderr
    assert "sparse 9/12 linears" in done.stdout and "adapters of rank 8 join at step 6" in done.stdout
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> tuple[Path, Callable[..., str]]:
    """A copy of the finished run to damage, and a maker of configs that point to it."""
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    config = json.loads((finished / "config.json").read_text())

    def make(**changes: Any) -> str:
        changed = json.loads(json.dumps(config)) | {"run": config["run"] | {"folder": str(run)}}
        for name, value in changes.items():
            section, _, key = name.partition("__")
            changed[section] = changed[section] | {key: value}
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(changed))
        return str(path)

    return run, make


def test_output_lies_in_the_run_folder(finished: Path) -> None:
    run = finished / "run"
    names = {path.name.split(".")[0] for path in run.iterdir()}
    written = {"config", "metrics", "events", "loss", "checkpoints", "end", "history", "corpora", ""}
    assert names == written, "the last is .lock"
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((run / "config.json").read_text())
    assert config["training"]["schedule"] == "cosine", "defaults are filled in"
    for row in step_rows(run):
        assert {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "phase"} <= row.keys()
    [evaluation] = evaluation_rows(run)
    assert {"step", "time", "eval_loss", "perplexity", "bits_per_byte"} == evaluation.keys()
    assert evaluation["bits_per_byte"] > 0


@pytest.mark.slow  # The README's own commands run this launcher and the next two, and are compared.
def test_deepspeed_with_one_process_is_plain_python(finished: Path, corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, checkpoint__interval=4)
    done = launch("deepspeed", "--master_port", str(port_to_meet_at()), SCRIPT, "--config", str(config))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == losses(finished)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [["deepspeed", "--num_gpus", "2"], ["torchrun", "--standalone", "--nproc_per_node", "2"]],
    ids=["deepspeed", "torchrun"],
)
def test_two_processes_are_one(launcher: list[str], finished: Path, corpus: Path, tmp_path: Path) -> None:
    skip_without_gpus(2)
    config = write_config(tmp_path, corpus)
    port = ["--master_port", str(port_to_meet_at())] if launcher[0] == "deepspeed" else []
    done = launch(*launcher, *port, SCRIPT, "--config", str(config))
    assert done.returncode == 0, done.stderr
    assert "ranks: 2" in done.stdout
    assert losses(tmp_path) == pytest.approx(losses(finished), rel=1e-5)


def error_lines(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_too_few_ranks_under_deepspeed_are_told_once_with_the_usual_cause(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, parallel__data=4)
    port = ["--master_port", str(port_to_meet_at())]
    done = launch("deepspeed", "--num_gpus", "2", *port, SCRIPT, "--config", str(config))
    assert done.returncode == 2
    [line] = error_lines(done.stderr)
    assert "= 4 ranks, but 2 were launched" in line
    assert line.endswith("the usual cause: the launcher saw one node; give deepspeed a --hostfile, or start with srun")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("launcher", [pytest.param("deepspeed", marks=pytest.mark.slow), "torchrun"])
def test_the_launchers_set_what_is_read(launcher: str, tmp_path: Path) -> None:
    script = tmp_path / "say.py"
    script.write_text("from slope_dist.parallel import environment\nprint(f'<{environment.discover()}>', flush=True)\n")
    if launcher == "deepspeed":
        (tmp_path / "hostfile").write_text("localhost slots=3\n")
        chosen = ["deepspeed", "--hostfile", str(tmp_path / "hostfile"), "--include", "localhost:0,2"]
        # Or it would log in to the host by ssh, to see whether it can and to ask for its address.
        chosen += ["--no_ssh_check", "--master_addr", "127.0.0.1"]
    else:
        chosen = ["torchrun", "--standalone", "--nproc_per_node", "2"]
    done = launch(*chosen, str(script))
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        place = f"rank={rank}, world_size=2, local_rank={rank}, local_world_size=2"
        assert f"<Environment({place}, launcher='deepspeed or torchrun')>" in done.stdout


@pytest.mark.parametrize("launcher", ["deepspeed", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_rank_that_raises_under_a_launcher_is_its_first_error(launcher: str, corpus: Path, tmp_path: Path) -> None:
    skip_without_gpus(2)
    config = write_config(tmp_path, corpus)
    script = tmp_path / "fail.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.parallel.test_failure import failing_entry_point\n"
        f"failing_entry_point({str(config)!r}, 'step', 'raise', [1])\n"
    )
    chosen = ["torchrun", "--standalone", "--nproc_per_node", "2"]
    if launcher == "deepspeed":
        chosen = ["deepspeed", "--num_gpus", "2", "--master_port", str(port_to_meet_at())]
    done = launch(*chosen, str(script))
    assert done.returncode == 1, done.stderr
    [line] = error_lines(done.stderr)
    assert line.startswith("error: rank 1 failed: RuntimeError: boom (tests/parallel/test_failure.py:")
    assert "gloo" not in done.stderr and "closed by peer" not in done.stderr


def test_exit_code_comes_through_the_deepspeed_launcher(finished: Path) -> None:
    done = launch("deepspeed", SCRIPT, "--config", str(finished / "config.json"), "--set", "training.stepz=3")
    assert done.returncode == 2
    assert "did you mean" in done.stderr and "Traceback" not in done.stderr


def test_dry_run_prints_and_touches_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path / "a", tmp_path / "nowhere")
    program = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    import torch.distributed as dist\n"
        "    print('group', dist.is_initialized(), 'deepspeed', 'deepspeed' in sys.modules); raise\n"
    )
    done = launch(str(BIN / "python"), "-c", program, SCRIPT, "--config", str(config), "--dry-run")
    assert done.returncode == 0, done.stderr
    head, brace, tail = done.stdout.rpartition("\n}\n")
    assert json.loads(head + brace)["training"]["global_batch_size"] == 8
    for said in ("kept in pruned weights", "128 tokens a step", "ranks: 1", "model state a rank", "rank then"):
        assert said in tail
    assert "no corpus" in tail and str(tmp_path / "nowhere") in tail
    assert "group False deepspeed False" in tail
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "config.json"]


def assert_refused(outcomes: list[Outcome], *said: str) -> None:
    """Exit code 2 on every rank; one error line on the first, nothing on the others."""
    assert [outcome.code for outcome in outcomes] == [2] * len(outcomes), outcomes[0].errors
    lines = outcomes[0].errors.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), outcomes[0].errors
    for text in said:
        assert text in lines[0], lines[0]
    assert [outcome.errors for outcome in outcomes[1:]] == [""] * (len(outcomes) - 1)


def test_unknown_key(finished: Path) -> None:
    outcomes = call("--config", str(finished / "config.json"), "--set", "training.learning_rat=1")
    assert_refused(outcomes, "training.learning_rat", "training.learning_rate")


def test_no_config(tmp_path: Path) -> None:
    assert_refused(call("--config", str(tmp_path / "none.json")), "no such file")


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_corpus_and_no_source(ranks: int, tmp_path: Path) -> None:
    config = write_config(tmp_path, tmp_path / "nowhere")
    assert_refused(call("--config", str(config), ranks=ranks), str(tmp_path / "nowhere"), "tools/prepare_data.py")
    assert not (tmp_path / "run").exists()


def test_batch_that_does_not_fit_the_ranks(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, training__micro_batch_size=8)
    assert_refused(call("--config", str(config), ranks=2), "global_batch_size 8", "micro_batch_size 4 would fit")


@pytest.mark.parametrize("ranks", [1, 2])
def test_run_folder_that_is_a_file(ranks: int, corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus)
    (tmp_path / "run").write_text("mine")
    assert_refused(call("--config", str(config), ranks=ranks), str(tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__ffn_size": 128}, "model.ffn_size 64 there, 128 here"),
        ({"run__seed": 8}, "seed 7 there, 8 here"),
        ({"sparsity": {"pattern": "dense"}}, "sparsity.pattern 2:4 there, dense here"),
        ({"adapters__rank": 16}, "adapters of rank 8"),
    ],
    ids=["model", "seed", "pattern", "adapters"],
)
def test_folder_of_another_run(changes: dict[str, Any], said: str, copy: Any) -> None:
    run, make = copy
    before = (run / "config.json").read_bytes()
    if "sparsity" in changes:
        config = json.loads(Path(make()).read_text()) | changes
        path = run.parent / "changed.json"
        path.write_text(json.dumps(config))
        outcomes = call("--config", str(path))
    else:
        outcomes = call("--config", make(**changes))
    assert_refused(outcomes, said, "choose another run.folder")
    assert (run / "config.json").read_bytes() == before


def test_folder_of_a_run_on_other_data(copy: Any, tmp_path: Path) -> None:
    _, make = copy
    end_ranks(make_corpus, 1, str(tmp_path / "other"), 4)
    assert_refused(call("--config", make(data__folder=str(tmp_path / "other"))), "data ", "tokenizer ")


def test_resume_never_refuses_a_used_folder(copy: Any) -> None:
    _, make = copy
    assert_refused(call("--config", make(), "--resume", "never"), "already holds checkpoints")


def damage(checkpoint: Path) -> None:
    """Change one byte in the middle of a file."""
    path = max(checkpoint.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("ranks", [1, 2])
def test_damaged_newest_checkpoint_is_passed_over(ranks: int, copy: Any, finished: Path) -> None:
    run, make = copy
    damage(run / "checkpoints/step-00000010")
    outcomes = call("--config", make(), ranks=ranks)
    assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes[0].errors
    assert "warning: " in outcomes[0].output and "step-00000010" in outcomes[0].output
    assert "sha256" in outcomes[0].output
    assert f"resumed from {run / 'checkpoints/step-00000008'}" in outcomes[0].output
    assert losses(run.parent) == (losses(finished) if ranks == 1 else pytest.approx(losses(finished), rel=1e-5))
    assert newest(run).step == 10


def test_only_damaged_checkpoints_are_not_started_over(copy: Any) -> None:
    run, make = copy
    for checkpoint in (run / "checkpoints").glob("step-*"):
        damage(checkpoint)
    metrics = (run / "metrics.jsonl").read_bytes()
    assert_refused(call("--config", make()), "no checkpoint", "can be loaded")
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_damaged_corpus(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    data = (tmp_path / "corpus/train.bin").read_bytes()
    (tmp_path / "corpus/train.bin").write_bytes(data[:-2])
    config = write_config(tmp_path, tmp_path / "corpus")
    assert_refused(call("--config", str(config)), "train.bin", "truncated")


def test_vocabulary_that_is_too_small(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, model__vocab_size=64)
    assert_refused(call("--config", str(config)), "model.vocab_size")
