"""Kill a run anywhere and give the same command again: every later number is the uninterrupted run's, to the last bit.
The checkpoint that a run goes on from is let go of once it is loaded.

Twelve steps, the adapters before step 8, column masks refreshed before steps 1, 6 and 11, an evaluation after every
third step, checkpoints after every second. The runs go through the entry point, in forked processes that kill
themselves with SIGKILL.

Run: pytest tests/training/test_resume.py
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slope_dist.checkpoint import Checkpoint
from slope_dist.checkpoint.format import MANIFEST, encode
from tests.distributed import Outcome, end_ranks, run_ranks
from tests.runs import evaluation_rows, newest, pretrain, step_rows, train, watch_engines, write_config

STEPS = 12
FIRST_ADAPTER_STEP = 8
EVALUATED = [3, 6, 9, 12]
CHANGES: dict[str, Any] = {
    "training__steps": STEPS,
    "adapters__fraction": 5 / 12,
    "sparsity__column_mask_interval": 5,
    "evaluation__interval": 3,
    "checkpoint__interval": 2,
}


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_run(config: str, place: str, number: int) -> None:
    """Run the entry point; the process dies at the `number`th time that it comes to `place`."""
    from slope_dist.training import trainer

    passed = 0

    def here() -> None:
        nonlocal passed
        passed += 1
        if passed == number:
            _die()

    if place in {"before step", "after step"}:
        watch_engines(lambda event, engine, detail: here() if event == place else None)
    elif place == "switch":
        watch_engines(lambda event, engine, detail: here() if event == "loaded" else None)
    elif place in {"evaluation row", "half a row"}:
        write = trainer.Journal._write

        def cut(journal: Any, row: dict[str, Any]) -> None:
            if passed + 1 == number and place == "half a row":
                journal._file.write('{"step": 4, "lo')
            else:
                write(journal, row)
            if place == "half a row" or "eval_loss" in row:
                here()

        trainer.Journal._write = cut  # type: ignore[method-assign]
    else:
        from slope_dist.checkpoint import writer

        save = writer.save

        def watched(*arguments: Any, **keywords: Any) -> Any:
            return save(*arguments, **keywords | {"progress": lambda event: here() if event == place else None})

        writer.save = watched
    pretrain("--config", config)


def whole_run(config: str) -> None:
    """Run the entry point to its end."""
    assert pretrain("--config", config) == 0


def run(function: Callable, ranks: int, *arguments: Any) -> list[Outcome]:
    return end_ranks(function, ranks, *arguments, process_group=False)


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[int, int, str], Path] = {}

    def make(ranks: int, stage: int, precision: str = "fp32") -> Path:
        key = ranks, stage, precision
        if key not in made:
            folder = tmp_path_factory.mktemp("uninterrupted")
            path = write_config(folder, corpus, **CHANGES, parallel__zero_stage=stage, precision=precision)
            outcomes = run(whole_run, ranks, str(path))
            assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes[0].errors
            made[key] = folder / "run"
        return made[key]

    return make


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what a clock made."""
    timed = {"time", "tokens_per_second", "mfu", "switch_seconds", "switch_peak_bytes"}
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def assert_same_run(found: Path, expected: Path) -> None:
    assert [row["step"] for row in step_rows(found)] == list(range(1, STEPS + 1))
    assert [row["step"] for row in evaluation_rows(found)] == EVALUATED
    assert numbers(step_rows(found)) == numbers(step_rows(expected))
    assert numbers(evaluation_rows(found)) == numbers(evaluation_rows(expected))
    mine, other = newest(found).manifest, newest(expected).manifest
    assert mine.step == other.step == STEPS
    # Same layout, so the files of the last checkpoint (weights, masters, moments, masks) are the same bytes.
    assert {name: file.sha256 for name, file in mine.files.items()} == {
        name: file.sha256 for name, file in other.files.items()
    }
    assert mine.scalars == other.scalars


CUTS = [
    # Before any checkpoint; between refreshes of the column masks; inside a save; in the middle of a row; at the
    # switch, before and after it was saved; after the last save but before the last evaluation.
    ("after step", 1),
    ("after step", 5),
    ("manifest", 2),
    ("half a row", 5),
    ("switch", 1),
    ("before step", 8),
    ("after step", 9),
    ("latest", 6),
]


@pytest.mark.parametrize(("place", "number"), CUTS)
def test_killed_run_goes_on_exactly(
    place: str, number: int, uninterrupted: Callable, corpus: Path, tmp_path: Path
) -> None:
    config = str(write_config(tmp_path, corpus, **CHANGES, parallel__zero_stage=1))
    [killed] = run(killed_run, 1, config, place, number)
    assert killed.code == -signal.SIGKILL, killed.errors
    [resumed] = run(whole_run, 1, config)
    assert resumed.code == 0, resumed.errors
    # The last save may be killed when the last evaluation, beside it, is done: then nothing is left to do.
    goes_on = "resumed from" in resumed.output or (place == "latest" and "is finished" in resumed.output)
    assert goes_on == ((place, number) != ("after step", 1))
    assert_same_run(tmp_path / "run", uninterrupted(1, 1))


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_run_killed_again_and_again_goes_on_exactly(
    stage: int, uninterrupted: Callable, corpus: Path, tmp_path: Path
) -> None:
    config = str(write_config(tmp_path, corpus, **CHANGES, parallel__zero_stage=stage))
    # After steps 3, 2 + 4 and 6 + 3: the last of them is in the adapters' phase.
    for number in (3, 4, 3):
        [killed] = run(killed_run, 1, config, "after step", number)
        assert killed.code == -signal.SIGKILL, killed.errors
    [resumed] = run(whole_run, 1, config)
    assert resumed.code == 0, resumed.errors
    assert_same_run(tmp_path / "run", uninterrupted(1, stage))


@pytest.mark.parametrize(
    ("number", "stage"),
    [
        (5, 3),
        (9, 1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((5, 1), (5, 2), (9, 2), (9, 3))),
    ],
)
def test_killed_run_of_two_ranks_goes_on_exactly(
    number: int, stage: int, uninterrupted: Callable, corpus: Path, tmp_path: Path
) -> None:
    config = str(write_config(tmp_path, corpus, **CHANGES, parallel__zero_stage=stage))
    killed = run(killed_run, 2, config, "after step", number)
    assert -signal.SIGKILL in [outcome.code for outcome in killed]
    resumed = run(whole_run, 2, config)
    assert [outcome.code for outcome in resumed] == [0, 0], resumed[0].errors
    assert_same_run(tmp_path / "run", uninterrupted(2, stage))


@pytest.mark.slow
def test_killed_run_in_bf16_goes_on_exactly(uninterrupted: Callable, corpus: Path, tmp_path: Path) -> None:
    config = str(write_config(tmp_path, corpus, **CHANGES, parallel__zero_stage=1, precision="bf16"))
    # After step 5; in the switch, which is the second load of a run resumed after step 4; after steps 6 + 3.
    for place, number in (("after step", 5), ("switch", 2), ("after step", 3)):
        [killed] = run(killed_run, 1, config, place, number)
        assert killed.code == -signal.SIGKILL, killed.errors
    # The row of the ninth step was not written any more.
    assert [row["step"] for row in step_rows(tmp_path / "run")] == list(range(1, 9))
    [resumed] = run(whole_run, 1, config)
    assert resumed.code == 0, resumed.errors
    assert_same_run(tmp_path / "run", uninterrupted(1, 1, "bf16"))


def held_while_training(config: str) -> list[Any]:
    """Goes on with a run; returns what there is of the checkpoint before its first and second step."""
    held: list[Any] = []

    def look(event: str, engine: Any, step: Any) -> None:
        if event == "before step" and step <= 2:
            mapped = sum(".safetensors" in line for line in Path("/proc/self/maps").read_text().splitlines())
            held.append([mapped, sum(isinstance(thing, Checkpoint) for thing in gc.get_objects())])

    watch_engines(look)
    train(config)
    return held


@pytest.mark.parametrize("stage", [1, 3])
def test_the_resumed_checkpoint_is_let_go_of(stage: int, corpus: Path, tmp_path: Path) -> None:
    """What retention removes under a run that has it open stays on the disk, and on NFS also in its folder."""
    config = str(write_config(tmp_path, corpus, **CHANGES, parallel__zero_stage=stage))
    [killed] = run(killed_run, 1, config, "after step", 5)
    assert killed.code == -signal.SIGKILL, killed.errors
    assert run_ranks(held_while_training, 1, config) == [[[0, 0], [0, 0]]]


def manifests_read(config: str) -> int:
    """Goes on with a run by the entry point, and returns how many manifests it decodes on the way."""
    from slope_dist.checkpoint import reader

    decode, count = reader.decode, 0

    def counted(data: bytes) -> Any:
        nonlocal count
        count += 1
        return decode(data)

    reader.decode = counted
    assert pretrain("--config", config) == 0
    return count


def test_a_run_reads_the_manifests_that_it_found_and_no_other(corpus: Path, tmp_path: Path) -> None:
    config = str(write_config(tmp_path, corpus, **CHANGES, checkpoint__asynchronous=False, checkpoint__keep=2))
    [killed] = run(killed_run, 1, config, "after step", 7)
    assert killed.code == -signal.SIGKILL, killed.errors
    # Those of steps 4 and 6: the older one is hashed before anything is removed in reliance on it.
    assert run(manifests_read, 1, config)[0].result == 2


def test_kill_between_evaluation_and_picture_leaves_one_evaluation(corpus: Path, tmp_path: Path) -> None:
    config = str(write_config(tmp_path, corpus, **CHANGES | {"training__steps": 3, "evaluation__interval": 0}))
    [killed] = run(killed_run, 1, config, "evaluation row", 1)
    assert killed.code == -signal.SIGKILL
    assert [row["step"] for row in evaluation_rows(tmp_path / "run")] == [3]
    assert not (tmp_path / "run/loss.png").exists()
    [resumed] = run(whole_run, 1, config)
    assert resumed.code == 0, resumed.errors
    assert [row["step"] for row in evaluation_rows(tmp_path / "run")] == [3]
    assert (tmp_path / "run/loss.png").exists()


def files_of(folder: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of change of every file."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_finished_run_says_so_and_touches_nothing(uninterrupted: Callable) -> None:
    folder = uninterrupted(1, 1)
    before = files_of(folder)
    [outcome] = run(whole_run, 1, str(folder.parent / "config.json"))
    assert outcome.code == 0
    assert f"this run is finished after step {STEPS}" in outcome.output
    assert str(folder / "metrics.jsonl") in outcome.output
    assert files_of(folder) == before


def test_cost_of_the_switch_is_in_the_row_of_its_step(uninterrupted: Callable) -> None:
    rows = step_rows(uninterrupted(1, 1))
    assert [row["step"] for row in rows if row.get("switch_seconds", 0) > 0] == [FIRST_ADAPTER_STEP]
    assert [row["phase"] for row in rows] == ["sparse"] * 7 + ["adapters"] * 5


def test_a_checkpoint_of_before_there_were_some_keys_resumes(corpus: Path, tmp_path: Path) -> None:
    path = str(write_config(tmp_path, corpus, checkpoint__interval=8, checkpoint__keep=5))
    run_ranks(train, 1, path)
    expected = [row["loss"] for row in step_rows(tmp_path / "run")]
    last = newest(tmp_path / "run").path
    shutil.rmtree(last)
    manifest = newest(tmp_path / "run").path / MANIFEST
    content = json.loads(manifest.read_text())
    del content["sha256"]
    for sections in (content["identity"], content["config"]):
        for key in ("norm_epsilon", "num_kv_heads", "tied_head", "rotary_base", "rotary_scaling"):
            del sections["model"][key]
        del sections["sparsity"]["layer_patterns"]
    del content["identity"]["end_of_document"]
    manifest.write_bytes(encode(content))
    run_ranks(train, 1, path)
    assert [row["loss"] for row in step_rows(tmp_path / "run")] == expected
    assert newest(tmp_path / "run").path == last
    # What the writer's config did know must still be the same.
    shutil.rmtree(last)
    other = str(write_config(tmp_path, corpus, model__norm_epsilon=1e-3, checkpoint__interval=8, checkpoint__keep=5))
    with pytest.raises(AssertionError, match=r"model.norm_epsilon 1e-05 there, 0.001 here"):
        run_ranks(train, 1, other)
