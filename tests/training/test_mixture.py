"""A run on several corpora: the same in every layout, resumed to the same bits from the step alone, evaluated on each;
and a corpus that changes, before or during a run, is refused by its file.

Run: pytest tests/training/test_mixture.py
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import Outcome, end_ranks, run_ranks
from tests.runs import (
    VOCAB_SIZE,
    evaluation_rows,
    make_corpus,
    newest,
    pretrain,
    relative,
    small_corpus,
    step_rows,
    train,
    watch_engines,
    write_config,
)

CHANGES: dict[str, Any] = {"checkpoint__interval": 4, "checkpoint__keep": 5, "evaluation__interval": 5}


def make_second(folder: str, tokenizer: str) -> None:
    make_corpus(folder, seed=4, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two corpora of one tokenizer."""
    first = small_corpus(tmp_path_factory.getbasetemp())
    second = tmp_path_factory.mktemp("second") / "other-corpus"
    run_ranks(make_second, 1, str(second), str(first / "tokenizer.model"))
    return first, second


def mixture(first: object, second: object, *weights: str) -> dict[str, Any]:
    return {"mixture": [f"{first}={weights[0]}", f"{second}={weights[1]}"]}


def config_of(folder: Path, corpora: tuple[Path, Path], **changes: Any) -> Path:
    return write_config(folder, corpora[0], **{"data": mixture(*corpora, "0.7", "0.3")} | CHANGES | changes)


def ended(config: Path) -> Outcome:
    (outcome,) = end_ranks(pretrain, 1, "--config", str(config), process_group=False)
    return outcome


def refusal(config: Path) -> str:
    """The line with which a run ends before it begins."""
    outcome = ended(config)
    assert outcome.result == 2, outcome.errors
    (line,) = [line for line in outcome.errors.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in outcome.errors
    return line


@pytest.fixture(scope="module")
def whole(corpora: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process."""
    folder = tmp_path_factory.mktemp("mixture")
    run_ranks(train, 1, str(config_of(folder, corpora)))
    return folder / "run"


@pytest.mark.parametrize("layout", [{"parallel__zero_stage": 1}, {"parallel__tensor": 2}], ids=["data", "tensor"])
def test_it_is_the_same_run_in_every_layout(layout, whole: Path, corpora: tuple[Path, Path], tmp_path: Path) -> None:
    run_ranks(train, 2, str(config_of(tmp_path, corpora, **layout)))
    rows, expected = step_rows(tmp_path / "run"), step_rows(whole)
    assert len(rows) == len(expected) == 10
    for mine, other in zip(rows, expected, strict=True):
        assert relative(mine["loss"], other["loss"]) <= 1e-5, mine["step"]
        assert relative(mine["grad_norm"], other["grad_norm"]) <= 1e-4, mine["step"]
    for mine, other in zip(evaluation_rows(tmp_path / "run"), evaluation_rows(whole), strict=True):
        for name in mine["corpora"]:
            assert relative(mine["corpora"][name]["eval_loss"], other["corpora"][name]["eval_loss"]) <= 1e-5


def test_it_goes_on_to_the_same_bits_however_the_corpora_are_listed(
    whole: Path, corpora: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints" / newest(whole).path.name)
    # The same shares, in another unit and order.
    swapped = mixture(corpora[1], corpora[0], "6", "14")
    run_ranks(train, 1, str(config_of(tmp_path, corpora, data=swapped)))
    assert newest(tmp_path / "run").manifest.files == newest(whole).manifest.files
    assert [row["loss"] for row in step_rows(tmp_path / "run")] == [row["loss"] for row in step_rows(whole)]
    found, expected = ([row | {"time": None} for row in evaluation_rows(run)] for run in (tmp_path / "run", whole))
    assert found == expected


def test_each_corpus_is_evaluated_as_it_is_alone(corpora: tuple[Path, Path], tmp_path: Path) -> None:
    """After one step too small to change a weight, so that all runs evaluate one model."""
    one = {"training__steps": 1, "training__learning_rate": 1e-25, "training__min_learning_rate": 0.0}
    one |= {"training__warmup_steps": 0, "adapters__rank": 0}
    run_ranks(train, 1, str(config_of(tmp_path / "both", corpora, **one)))
    (together,) = evaluation_rows(tmp_path / "both/run")
    assert sorted(together["corpora"]) == ["other-corpus", "small-corpus"]
    for corpus in corpora:
        run_ranks(train, 1, str(write_config(tmp_path / corpus.name, corpus, **CHANGES | one)))
        (alone,) = evaluation_rows(tmp_path / corpus.name / "run")
        for name, value in together["corpora"][corpus.name].items():
            assert relative(value, alone[name]) <= 1e-6
    losses = [together["corpora"][corpus.name]["eval_loss"] for corpus in corpora]
    assert losses[0] != losses[1]
    assert relative(together["eval_loss"], 0.7 * losses[0] + 0.3 * losses[1]) <= 1e-12


def test_another_mixture_is_refused_with_the_difference(
    whole: Path, corpora: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    line = refusal(config_of(tmp_path, corpora, data=mixture(*corpora, "1", "1")))
    assert "data.other-corpus.share 3/10 there, 1/2 here; data.small-corpus.share 7/10 there, 1/2 here" in line
    assert "is of another run: data {" in refusal(write_config(tmp_path, corpora[0], **CHANGES))


def test_a_mixture_of_one_is_that_corpus(corpora: tuple[Path, Path], tmp_path: Path) -> None:
    """By its identity and by its samples, so that one goes on from the other."""
    run_ranks(train, 1, str(write_config(tmp_path / "alone", corpora[0], **CHANGES)))
    run_ranks(train, 1, str(write_config(tmp_path, corpora[0], **CHANGES, data={"mixture": [f"{corpora[0]}=3"]})))
    assert newest(tmp_path / "run").manifest.files == newest(tmp_path / "alone/run").manifest.files
    shutil.rmtree(tmp_path / "run/checkpoints" / newest(tmp_path / "run").path.name)
    run_ranks(train, 1, str(write_config(tmp_path, corpora[0], **CHANGES)))
    assert newest(tmp_path / "run").manifest.files == newest(tmp_path / "alone/run").manifest.files


def test_what_a_mixture_does_not_follow_is_noted(corpora: tuple[Path, Path], tmp_path: Path) -> None:
    for asked in ({}, {"valid_fraction": 0.5, "tokenizer": str(tmp_path / "absent")}):
        config = config_of(tmp_path / str(len(asked)), corpora, data=mixture(*corpora, "1", "1") | asked)
        outcome = ended(config)
        assert outcome.result == 0, outcome.errors
        notes = [line for line in outcome.output.splitlines() if line.startswith("note: data.")]
        assert len(notes) == 2 * len(asked) and all("does not apply" in note for note in notes)


def test_corpora_of_different_tokenizers_are_refused(corpora: tuple[Path, Path], tmp_path: Path) -> None:
    run_ranks(make_corpus, 1, str(tmp_path / "stranger"), 5)
    line = refusal(config_of(tmp_path, (corpora[0], tmp_path / "stranger")))
    assert "stranger and " in line and "were made with different tokenizers" in line


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"mixture": ["a=1", "a"]},
            'data.mixture[1]: must be "FOLDER=WEIGHT", a folder that ends in a name and a weight above 0',
        ),
        ({"mixture": ["a=1", "x/a=2"]}, 'data.mixture has two corpora called "a"'),
        ({"mixture": ["a=1", "b=0.0"]}, "data.mixture[1]: must be"),
        ({"mixture": ["a=1", "b=0.123457"]}, "samples would repeat their order of corpora after"),
        ({"mixture": ["a=1"], "folder": "b"}, "data.folder and data.mixture are both given"),
        ({"mixture": ["a=1"], "source": "python-stdlib"}, "needs data.folder"),
        ({}, "data.folder is required"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(data, message: str, tmp_path: Path) -> None:
    line = refusal(write_config(tmp_path, tmp_path, data=data))
    assert message in line
    assert not (tmp_path / "run").exists()


def copies(corpora: tuple[Path, Path], folder: Path) -> tuple[Path, Path]:
    """The corpora, to be meddled with."""
    first, second = (Path(shutil.copytree(corpus, folder / corpus.name)) for corpus in corpora)
    return first, second


def altered(path: Path) -> None:
    """Another token in place of one, as if nothing had happened to size and names."""
    with path.open("r+b") as file:
        file.seek(100)
        byte = file.read(1)[0]
        file.seek(100)
        file.write(bytes([byte ^ 1]))


def meddled_run(config: str, corpus: str, how: str) -> int:
    """Train, while somebody does something to the corpus before the sixth step."""

    def meddle(event: str, engine: Any, detail: Any) -> None:
        path = Path(corpus, "train.bin")
        if (event, detail) == ("after step", 6):
            if how == "altered":
                altered(path)
            elif how == "cut short":
                os.truncate(path, path.stat().st_size // 2)
            else:
                path.unlink()

    watch_engines(meddle)
    return pretrain("--config", config)


@pytest.mark.parametrize("how", ["altered", "cut short", "removed"])
def test_a_corpus_that_changes_under_a_run_ends_it_and_put_back_lets_it_go_on(
    how: str, whole: Path, corpora: tuple[Path, Path], tmp_path: Path
) -> None:
    own = copies(corpora, tmp_path)
    config = config_of(tmp_path, own)
    (outcome,) = end_ranks(meddled_run, 1, str(config), str(own[0]), how, process_group=False)
    assert outcome.result == 2 and "Traceback" not in outcome.errors, outcome.errors
    (line,) = [line for line in outcome.errors.splitlines() if line.startswith("error: ")]
    assert str(own[0] / "train.bin") in line
    assert json.loads((tmp_path / "run/end.json").read_text())["how"] == "failed"
    if how == "altered":
        # Size and names are right, so only reading it through tells.
        assert f"{own[0] / 'train.bin'} was altered" in refusal(config)
    shutil.copy(corpora[0] / "train.bin", own[0] / "train.bin")
    assert ended(config).result == 0
    assert [row["loss"] for row in step_rows(tmp_path / "run")] == [row["loss"] for row in step_rows(whole)]


def test_a_run_reads_its_corpora_through_once(corpora: tuple[Path, Path], tmp_path: Path) -> None:
    """What it wrote down is what it trusts: without that it looks again, and finds what was done behind its back."""
    own = copies(corpora, tmp_path)
    config = config_of(tmp_path, own)
    assert ended(config).result == 0
    seen = json.loads((tmp_path / "run/corpora.json").read_text())
    assert sorted(key.split(" of ")[0] for key in seen) == ["train", "train", "valid", "valid"]
    path = own[0] / "valid.bin"
    before = path.stat()
    altered(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ended(config).result == 0
    for damage in ('{"garbage": [', "[]", '{"a": 1}'):
        (tmp_path / "run/corpora.json").write_text(damage)
        assert f"{path} was altered" in refusal(config)


def test_what_changes_before_it_is_written_down_is_read_again(corpora: tuple[Path, Path], tmp_path: Path) -> None:
    own = copies(corpora, tmp_path)
    config = config_of(tmp_path, own)
    (outcome,) = end_ranks(late_change, 1, str(config), str(own[0] / "valid.bin"), process_group=False)
    assert outcome.result == 2 and "valid.bin was changed while the run reads it" in outcome.errors
    assert "valid.bin was altered" in refusal(config)


def late_change(config: str, path: str) -> int:
    """Train; the corpus changes between its reading and the note of it."""
    from slope_dist.training.corpora import Corpora

    remember = Corpora.remember

    def late(self: Corpora) -> None:
        altered(Path(path))
        remember(self)

    Corpora.remember = late  # type: ignore[method-assign]
    return pretrain("--config", config)


def megatron_run(config: str, corpus: str, prefix: str) -> None:
    """Train on one pair of files, as Megatron-LM's preprocessing makes it: no split, manifest or tokenizer."""
    from slope_dist.data.prepare import megatron_indexed_dataset

    module = megatron_indexed_dataset()
    source = module.IndexedDataset(str(Path(corpus, "train")))
    builder = module.IndexedDatasetBuilder(f"{prefix}.bin", dtype=module.DType.optimal_dtype(VOCAB_SIZE))
    for document in range(len(source)):
        builder.add_document(source[document], [len(source[document])])
    builder.finalize(f"{prefix}.idx")
    train(config)


@pytest.mark.parametrize("tokenizer", [False, True], ids=["bare", "with its tokenizer"])
def test_a_corpus_of_megatrons_is_trained_on_as_it_is(
    tokenizer: bool, corpora: tuple[Path, Path], tmp_path: Path
) -> None:
    prefix = tmp_path / "my.v1_text_document"
    data: dict[str, Any] = {"folder": str(prefix), "valid_fraction": 0.2}
    if tokenizer:
        data["tokenizer"] = str(corpora[0] / "tokenizer.model")
    config = write_config(tmp_path, tmp_path, data=data)
    run_ranks(megatron_run, 1, str(config), str(corpora[0]), str(prefix))
    assert len(step_rows(tmp_path / "run")) == 10
    assert all((row["bits_per_byte"] is not None) == tokenizer for row in evaluation_rows(tmp_path / "run"))
    # The same on two ranks, of which one reads it through.
    run_ranks(train, 2, str(write_config(tmp_path / "two", tmp_path, data=data)))
    for mine, other in zip(step_rows(tmp_path / "two/run"), step_rows(tmp_path / "run"), strict=True):
        assert relative(mine["loss"], other["loss"]) <= 1e-5
    # Finished, and found to be so: without a manifest the fingerprint is that of what was read.
    assert ended(config).result == 0
    altered(prefix.with_name(prefix.name + ".bin"))
    assert "is of another run: data " in refusal(config)
