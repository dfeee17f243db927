"""Claim: tools/evaluate.py gives a run's own result for its checkpoint and for every form it is converted to, states
what the result depends on, and answers what it cannot use with one line and exit code 2.

Run: pytest tests/inference/test_evaluate.py
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from slope_dist.data.readers import Document
from slope_dist.export import open_model
from slope_dist.export.exporting import FORMS, convert
from slope_dist.export.options import Options
from slope_dist.inference import load_model
from slope_dist.inference.evaluation import View, evaluate_documents
from slope_dist.transfer import Transfer
from tests.distributed import run_ranks
from tests.inference.conftest import TEXTS, Tool
from tests.runs import evaluation_rows, make_corpus, relative


@pytest.fixture(scope="module")
def converted(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run's model in every form, by name."""
    folder = tmp_path_factory.mktemp("converted")
    stored = open_model(run)
    for form in FORMS:
        convert(stored, form, folder / form, Options(), Transfer(), Transfer())
    return {"checkpoint": run} | {form: folder / form for form in FORMS}


@pytest.mark.parametrize("form", ["checkpoint", *FORMS])
def test_every_form_has_the_result_of_the_run(
    run: Path, corpus: Path, converted: dict[str, Path], evaluate: Tool, form: str
) -> None:
    (row,) = evaluation_rows(run)
    code, output, errors = evaluate(converted[form], "--corpus", corpus, "--json")
    assert (code, errors) == (0, "")
    found = json.loads(output)
    assert relative(found["loss"], row["eval_loss"]) < 1e-5
    assert relative(found["bits_per_byte"], row["bits_per_byte"]) < 1e-5
    assert (found["form"], found["corpus"], found["split"]) == (form, str(corpus), "valid")
    assert (found["context"], found["stride"], found["dtype"], found["device"]) == (64, 64, "fp32", "cpu")
    assert found["tokens"] % 64 == 0 and 0 <= found["left_out"] < 64
    # Hugging Face's files have no place for it.
    assert found.get("step") == (row["step"] if form in ("checkpoint", "slope") else None)


def test_the_text_says_what_the_json_does(run: Path, corpus: Path, evaluate: Tool) -> None:
    view = ("--context", 32, "--stride", 8, "--dtype", "bf16")
    how = (run, "--corpus", corpus, "--split", "train", "--limit", 130, *view)
    found = json.loads(evaluate(*how, "--json")[1])
    code, output, _ = evaluate(*how)
    lines = output.splitlines()
    assert code == 0
    assert lines[0] == (
        f"loss {found['loss']:.4f}, perplexity {found['perplexity']:.2f}, {found['bits_per_byte']:.4f} bits per byte"
    )
    assert lines[1].endswith(" after step 6, bf16 on cpu")
    assert lines[2] == (
        f"text: {corpus}, train split: 130 tokens, {found['bytes']:,} bytes ({found['left_out']:,} tokens behind them "
        "left out)"
    )
    assert lines[3:] == ["context 32, stride 8"]


def test_files_of_text(run: Path, evaluate: Tool, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[0])
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    model = load_model(run)
    documents = [Document(name="", text=text) for text in (TEXTS[0], *TEXTS)]
    expected = evaluate_documents(model, documents, View.of(model, stride=10))
    code, output, _ = evaluate(
        run, "--field", "body", "--stride", 10, tmp_path / "a.txt", tmp_path / "b.jsonl", "--batch", 2, "--json"
    )
    found = json.loads(output)
    assert code == 0
    assert relative(found["loss"], expected.loss) < 1e-6
    assert found["bytes"] == sum(len(document.text.encode()) for document in documents)
    assert found["text"] == [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    assert "left_out" not in found
    texts = [tmp_path / f"{number}.txt" for number in range(5)]
    for path in texts:
        path.write_text(TEXTS[0])
    code, output, _ = evaluate(run, *texts, "--limit", 4)
    named = " ".join(map(str, texts[:3]))
    assert (code, output.splitlines()[2].partition(": 4 tokens")[0]) == (0, f"text: {named} and 2 more")
    assert json.loads(evaluate(run, *texts, "--limit", 4, "--json")[1])["text"] == list(map(str, texts))


def test_a_corpus_without_a_tokenizer_has_no_bytes(run: Path, corpus: Path, evaluate: Tool, tmp_path: Path) -> None:
    """As Megatron-LM makes them: one pair of files, of whose documents the last are for validation."""
    for kind in ("bin", "idx"):
        shutil.copy(corpus / f"train.{kind}", tmp_path / f"mine.{kind}")
    how = ("--corpus", tmp_path / "mine", "--valid-fraction", 0.3, "--json")
    code, output, errors = evaluate(run, *how)
    assert code == 0
    assert errors.startswith(f"note: {tmp_path / 'mine'} has no tokenizer; its ids are taken for the model's")
    plain = json.loads(output)
    assert (plain["bytes"], plain["bits_per_byte"]) == (None, None)
    code, output, errors = evaluate(run, *how, "--tokenizer", corpus / "tokenizer.model")
    found = json.loads(output)
    assert (code, errors) == (0, "")
    assert found["loss"] == plain["loss"]
    assert found["bytes"] > found["tokens"]


def make_other(folder: str) -> None:
    make_corpus(folder, seed=5)


def test_a_corpus_of_another_tokenizer_is_refused(run: Path, evaluate: Tool, tmp_path: Path) -> None:
    run_ranks(make_other, 1, str(tmp_path / "other"))
    code, output, errors = evaluate(run, "--corpus", tmp_path / "other")
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith(f"error: {tmp_path / 'other'} was made with another tokenizer than the model's")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --corpus or TEXT_FILE, one of the two"),
        (["a.txt", "--corpus", "{corpus}"], "give --corpus or TEXT_FILE, one of the two"),
        (["a.txt", "--split", "train"], "--split and --valid-fraction are for --corpus"),
        (["--corpus", "{corpus}", "--field", "x"], "--field is for TEXT_FILE"),
        (["--corpus", "{corpus}", "--valid-fraction", "nan"], "--valid-fraction nan is not between 0 and 1"),
        (["--corpus", "{corpus}", "--valid-fraction", "0.3"], "--valid-fraction does not apply: {corpus} is split"),
        (["--corpus", "{corpus}", "--limit", "0"], "--limit 0 is less than 1"),
        (["--corpus", "{corpus}", "--context", "65"], "context 65 is out of range; use one from 1 to the model's, 64"),
        (["--corpus", "{corpus}", "--stride", "65"], "stride 65 is out of range"),
        (["--corpus", "{corpus}", "--device", "cuda"], "device cuda is not there"),
        (["--corpus", "{tmp}/none"], "no corpus in {tmp}/none"),
        (["{tmp}/none.txt"], "input {tmp}/none.txt does not exist"),
        (["{tmp}/blank.txt"], "there is no text to evaluate on"),
        (["{tmp}/latin.txt"], "{tmp}/latin.txt is not UTF-8 text: bad byte at offset 1"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    run: Path, corpus: Path, evaluate: Tool, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "blank.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"a\xe9")
    if message.startswith("device") and os.path.exists("/dev/nvidia0"):
        pytest.skip("there is a GPU")
    code, output, errors = evaluate(run, *(argument.format(tmp=tmp_path, corpus=corpus) for argument in arguments))
    assert (code, output) == (2, "")
    (line,) = errors.splitlines()
    assert line.startswith(f"error: {message.format(tmp=tmp_path, corpus=corpus)}")
