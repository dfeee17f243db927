"""Claim: what a run cannot do it says before it starts, on all ranks together; after a failure it names the way on.

Run: pytest tests/training/test_entry.py
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from slope_dist.errors import EXIT_BAD_INPUT, EXIT_STOPPED, UserError
from slope_dist.parallel.environment import Environment
from slope_dist.training.entry import Request, how_to_go_on
from slope_dist.training.folder import Resume, read_rows
from tests.distributed import end_ranks
from tests.runs import pretrain, write_config


def entry_point(*arguments: str) -> None:
    raise SystemExit(pretrain(*arguments))


def refuse_on_rank_one(config: str) -> None:
    """The fit check fails on rank 1 alone, as on a machine with less memory than the others."""
    from slope_dist.training import trainer

    def refuse(*arguments: object) -> None:
        if os.environ["RANK"] == "1":
            raise UserError("too little memory here")

    trainer.refuse_what_will_not_fit = refuse
    entry_point("--config", config)


def one_line(errors: str) -> str:
    [line] = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in errors
    return line


def test_a_refusal_of_one_rank_ends_all_with_its_reason(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus)
    first, second = end_ranks(refuse_on_rank_one, 2, str(config), process_group=False, timeout=60)
    assert (first.code, second.code) == (2, 2)
    assert one_line(first.errors) == "error: rank 1: too little memory here"
    assert not (tmp_path / "run").exists()


def fail_on(config: str, end: str, where: str, rank: str, number: int) -> None:
    """A file server's error, as a rank meets it in its config, before training, or in its third step."""
    from slope_dist.data.corpus import Corpus
    from slope_dist.training import entry, trainer
    from slope_dist.training.ending import END_FILE

    def fail(*arguments: object) -> None:
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise UserError(f"cannot read it: {error.strerror}") from error

    def fail_in_third_step(step: int) -> None:
        begin_step(step)
        if step == 3:
            Corpus._read = fail

    begin_step = trainer.begin_step
    os.environ[END_FILE] = end
    if os.environ.get("RANK", "0") == rank:
        if where == "config":
            entry.load_config = fail
        elif where == "before":
            trainer.refuse_what_will_not_fit = fail
        else:
            trainer.begin_step = fail_in_third_step
    entry_point("--config", config)


@pytest.mark.parametrize(
    ("where", "rank", "number", "temporary", "trained"),
    [
        ("config", "0", errno.EIO, True, None),
        ("config", "0", errno.EACCES, False, None),
        ("before", "0", errno.ENOSPC, True, 0),
        ("before", "1", errno.ESTALE, True, 0),
        ("before", "1", errno.ENOENT, False, 0),
        ("training", "0", errno.EIO, True, 2),
        ("training", "1", errno.ENOENT, False, 2),
    ],
)
def test_the_end_says_what_may_pass_and_how_far_training_came(
    where: str, rank: str, number: int, temporary: bool, trained: int | None, corpus: Path, tmp_path: Path
) -> None:
    config, end = write_config(tmp_path, corpus), tmp_path / "job.json"
    ranks = 1 if where == "config" else 2
    outcomes = end_ranks(fail_on, ranks, str(config), str(end), where, rank, number, process_group=False, timeout=60)
    assert outcomes[int(rank)].code == EXIT_BAD_INPUT, outcomes[int(rank)].errors
    said = json.loads(end.read_text())
    assert said["exit_code"] == EXIT_BAD_INPUT and os.strerror(number) in said["cause"]
    assert (said["temporary"], said.get("trained")) == (temporary, trained)


def asked_while_it_reads_its_config(config: str, end: str, name: str) -> None:
    """A signal comes before this rank has met the others."""
    import signal

    from slope_dist.training import entry
    from slope_dist.training.ending import END_FILE

    os.environ[END_FILE] = end
    entry.load_config = lambda *arguments: os.kill(os.getpid(), getattr(signal, name))
    entry_point("--config", config)


@pytest.mark.parametrize(("name", "written"), [("SIGUSR1", True), ("SIGTERM", False)])
def test_what_launchers_end_ranks_with_is_no_request(name: str, written: bool, corpus: Path, tmp_path: Path) -> None:
    """Of a launcher whose other rank has failed: a job's file that said "stopped" would end the job as if asked to."""
    config, end = write_config(tmp_path, corpus), tmp_path / "job.json"
    [rank] = end_ranks(asked_while_it_reads_its_config, 1, str(config), str(end), name, process_group=False)
    assert rank.code == EXIT_STOPPED
    assert end.exists() == written
    assert not written or json.loads(end.read_text())["cause"] == name


def entry_point_without_a_meeting_point(config: str, slurm_nodes: str) -> None:
    """What is refused here is refused before ranks would meet: meeting would be refused for another reason."""
    import os

    os.environ.pop("MASTER_ADDR", None)
    if slurm_nodes:
        os.environ["SLURM_JOB_NUM_NODES"] = slurm_nodes
    entry_point("--config", config)


@pytest.mark.parametrize("slurm_nodes", ["", "2"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_that_are_not_the_layouts_are_refused_before_they_meet(
    ranks: int, slurm_nodes: str, corpus: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, corpus, parallel__data=4)
    outcomes = end_ranks(entry_point_without_a_meeting_point, ranks, str(config), slurm_nodes, process_group=False)
    assert [outcome.code for outcome in outcomes] == [2] * ranks
    line = one_line(outcomes[0].errors)
    assert "= 4 ranks, but " in line and f"{ranks} w" in line
    assert ("the usual cause: the launcher saw one node of the 2 in the SLURM" in line) == bool(slurm_nodes)
    assert [outcome.errors for outcome in outcomes[1:]] == [""] * (ranks - 1)
    assert not (tmp_path / "run").exists()


def test_more_ranks_than_the_layouts_are_not_put_down_to_a_missing_node(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, parallel__data=1)
    outcomes = end_ranks(entry_point_without_a_meeting_point, 2, str(config), "2", process_group=False)
    assert "= 1 ranks, but 2 were launched" in one_line(outcomes[0].errors)
    assert "usual cause" not in outcomes[0].errors


def test_a_validation_split_too_short_for_a_sample_is_refused_before_training(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, model__sequence_length=4096)
    [outcome] = end_ranks(entry_point, 1, "--config", str(config), process_group=False)
    assert outcome.code == 2 and "fewer than one sample of 4096" in one_line(outcome.errors)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("globs", "reason"),
    [(["*.fc9"], '"*.fc9" matches no linear'), (["*"], "leaves no linear sparse")],
)
def test_dense_layers_that_cannot_be_meant(corpus: Path, tmp_path: Path, globs: list[str], reason: str) -> None:
    config = write_config(tmp_path, corpus, sparsity__dense_layers=globs)
    [outcome] = end_ranks(entry_point, 1, "--config", str(config), "--dry-run", process_group=False)
    assert outcome.code == 2 and reason in one_line(outcome.errors)


def test_a_layer_pattern_for_no_layer(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, sparsity__layer_patterns=["*.layers.0.self_attn.q_proj=2:8"])
    [outcome] = end_ranks(entry_point, 1, "--config", str(config), "--dry-run", process_group=False)
    assert outcome.code == 2 and 'q_proj=2:8" is the first match of no sparse linear' in one_line(outcome.errors)


def test_no_word_on_checkpoints_where_none_was_looked_for(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus)
    metrics = tmp_path / "run/metrics.jsonl"
    metrics.mkdir(parents=True)
    [outcome] = end_ranks(entry_point, 1, "--config", str(config), process_group=False)
    assert outcome.code == 2 and str(metrics) in one_line(outcome.errors)


def test_a_command_line_that_is_not_one_gets_one_line() -> None:
    [outcome] = end_ranks(entry_point, 1, "--confgi", "x.json", process_group=False)
    assert outcome.code == 2 and "--help" in one_line(outcome.errors)


def test_the_dry_run_of_several_processes_speaks_once(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus)
    first, second = end_ranks(entry_point, 2, "--config", str(config), "--dry-run", process_group=False)
    assert (first.code, second.code) == (0, 0)
    assert "model state a rank" in first.output and second.output == ""


def entry_point_without_room(*arguments: str) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    entry_point(*arguments)


def test_a_dry_run_whose_output_has_no_room_is_one_line(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus)
    [outcome] = end_ranks(entry_point_without_room, 1, "--config", str(config), "--dry-run", process_group=False)
    assert outcome.code == EXIT_BAD_INPUT
    assert one_line(outcome.errors) == "error: standard output cannot be written: No space left on device"


def test_a_run_whose_output_has_no_room_trains(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus)
    [outcome] = end_ranks(entry_point_without_room, 1, "--config", str(config), process_group=False)
    assert (outcome.code, outcome.errors) == (0, "")
    assert json.loads((tmp_path / "run/end.json").read_text())["how"] == "finished"


@pytest.mark.parametrize(
    ("place", "variables", "expected"),
    [
        (Environment(0, 1, 0, 1, "none"), {}, "python"),
        (Environment(0, 2, 0, 2, "deepspeed or torchrun"), {}, "deepspeed --num_gpus 2"),
        (Environment(0, 2, 0, 2, "deepspeed or torchrun"), {"TORCHELASTIC_RUN_ID": "x"}, "torchrun --nproc_per_node 2"),
        (Environment(0, 4, 0, 4, "srun"), {}, "srun --ntasks 4"),
        (Environment(0, 16, 0, 8, "deepspeed or torchrun"), {}, "(the same launcher and nodes)"),
    ],
    ids=["python", "deepspeed", "torchrun", "srun", "nodes"],
)
def test_the_command_to_go_on_with_is_the_one_that_was_given(
    monkeypatch: pytest.MonkeyPatch, place: Environment, variables: dict[str, str], expected: str
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said = how_to_go_on(Path("run/checkpoints/step-00000004"), Request("a b.json", ("training.steps=9",)), place)
    assert "last complete checkpoint is run/checkpoints/step-00000004" in said
    assert expected in said and said.endswith("launch/pretrain.py --config 'a b.json' --set training.steps=9")
    assert "there is no checkpoint yet" in how_to_go_on(None, Request("a.json"), place)
    accepting = Request("a.json", resume=Resume(accept_steps=True))
    assert how_to_go_on(None, accepting, place).endswith("launch/pretrain.py --config a.json --accept-steps")


def test_a_bad_line_of_metrics_is_named_and_a_cut_last_one_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    good = json.dumps({"step": 1, "loss": 2.0})
    path.write_text(f'{good}\n{{"step": 2, "lo')
    assert read_rows(path) == [{"step": 1, "loss": 2.0}]
    for bad in ("not json", "[1]", '{"loss": 1.0}', "\udcff"):
        path.write_bytes(f"{good}\n{bad}\n{good}\n".encode(errors="surrogateescape"))
        with pytest.raises(UserError, match="line 2 is not a row of metrics"):
            read_rows(path)
