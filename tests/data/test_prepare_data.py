"""Claim: tools/prepare_data.py makes a corpus, and answers bad input by one line and exit code 2.

python -m pytest tests/data/test_prepare_data.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest

from slope_dist.data.corpus import Corpus
from tests.programs import output_to, run_python

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "prepare_data.py"


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("prepare_data", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_the_command_makes_a_corpus(tmp_path, make_texts):
    for number, text in enumerate(make_texts(20)):
        (tmp_path / f"{number}.txt").write_text(text)
    result = run(tmp_path, "--output", tmp_path / "corpus", "--vocab-size", 300, "--valid-fraction", 0.3)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    assert "MB/s" in result.stderr
    assert "corpus of 300 ids" in result.stdout
    documents = sum(Corpus.open(tmp_path / "corpus", s, 300).num_documents for s in ("train", "valid"))
    assert documents == 20


def test_an_output_without_room_is_one_line_and_the_corpus_is_there(tmp_path, tokenizer_file, make_texts):
    for number, text in enumerate(make_texts(20)):
        (tmp_path / f"{number}.txt").write_text(text)
    options = ("--output", tmp_path / "corpus", "--tokenizer", tokenizer_file, "--valid-fraction", 0.3)
    with output_to("a full device") as output:
        result = run_python(TOOL, tmp_path, *options, stdout=output)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: standard output cannot be written: ")
    assert (tmp_path / "corpus/manifest.json").exists()


def test_a_name_that_cannot_be_shown_is_escaped(tmp_path, tokenizer_file, make_texts):
    for number, text in enumerate(make_texts(20)):
        (tmp_path / f"{number}.txt").write_text(text)
    options = ("--tokenizer", tokenizer_file, "--valid-fraction", 0.3, "--output", tmp_path / "k\u00f6rper\udcff")
    result = run(tmp_path, *options, PYTHONIOENCODING="ascii:strict", PYTHONUTF8="1")
    assert result.returncode == 0, result.stderr
    assert "k\\xf6rper\\udcff; set data.folder to it" in result.stdout


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n{"text": 1}\n')
    result = run(tmp_path / "rows.jsonl", "--output", tmp_path / "corpus")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {tmp_path}/rows.jsonl:2: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "corpus").exists()


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(tmp_path, tokenizer_file, make_texts):
    with (tmp_path / "rows.jsonl").open("w") as file:
        for text in make_texts(3000) * 2:
            file.write(json.dumps({"text": text}) + "\n")
    options = (tmp_path / "rows.jsonl", "--output", tmp_path / "corpus", "--tokenizer", tokenizer_file)
    command = [sys.executable, str(TOOL), *map(str, options), "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    journal = tmp_path / "corpus.partial" / "journal.jsonl"
    # Its second line is there from the first moment that can be gone on with.
    while not journal.exists() or journal.read_text().count("\n") < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert error == "interrupted: no corpus was written; the same command goes on with what was done\n"
    assert not (tmp_path / "corpus").exists()
    result = run(*options, "--workers", 1)
    assert result.returncode == 0 and f"going on with {tmp_path}/corpus.partial" in result.stderr


def test_bad_rows_are_left_out_and_told(tmp_path, make_texts):
    rows = [json.dumps({"text": text}) for text in make_texts(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, "{", *rows]))
    options = ("--output", tmp_path / "corpus", "--vocab-size", 300, "--valid-fraction", 0.3)
    result = run(tmp_path / "rows.jsonl", *options, "--skip-bad-rows")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("rows left out: 1\n")
    assert f"left out: {tmp_path}/rows.jsonl:21: not a JSON object" in result.stderr
    assert json.loads((tmp_path / "corpus/manifest.json").read_text())["rows_rejected"] == 1


def test_why_nothing_is_left_is_told(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"body": "x"}\n' * 30)
    result = run(tmp_path / "rows.jsonl", "--output", tmp_path / "corpus", "--skip-bad-rows")
    assert result.returncode == 2 and not (tmp_path / "corpus").exists()
    assert 'rows.jsonl:1: field "text" is missing' in result.stderr and "left out: 20 more rows" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("stream", [False, True])
def test_a_dataset_becomes_a_corpus(tmp_path, make_texts, stream):
    datasets.Dataset.from_dict({"body": make_texts(20)}).save_to_disk(str(tmp_path / "saved"))
    options = ("--field", "body", "--output", tmp_path / "corpus", "--vocab-size", 300, "--valid-fraction", 0.3)
    result = run("--dataset", tmp_path / "saved", *options, *(["--stream"] if stream else []))
    assert result.returncode == 0, result.stderr
    documents = sum(Corpus.open(tmp_path / "corpus", s, 300).num_documents for s in ("train", "valid"))
    assert documents == 20
    assert ("%," in result.stderr) != stream


BAD_ARGUMENTS = {
    "no output": (["a.txt"], "--output"),
    "no input": (["--output", "corpus"], "give INPUT, --dataset or --source"),
    "both": (["a.txt", "--source", "python-stdlib", "--output", "corpus"], "give INPUT, --dataset or --source"),
    "unknown source": (["--source", "wikipedia", "--output", "corpus"], "wikipedia"),
    "unknown option": (["a.txt", "--output", "corpus", "--out"], "--out"),
    "not a number": (["a.txt", "--output", "corpus", "--vocab-size", "many"], "many"),
    "two tokenizers": (
        ["a.txt", "--output", "corpus", "--vocab-size", "300", "--tokenizer", "t.model"],
        "not allowed with",
    ),
    "absent input": (["b.txt", "--output", "corpus"], "b.txt does not exist"),
    "absent tokenizer": (["a.txt", "--output", "corpus", "--tokenizer", "t.model"], "t.model"),
    "small vocabulary": (["a.txt", "--output", "corpus", "--vocab-size", "-5"], "out of range"),
    "large vocabulary": (["a.txt", "--output", "corpus", "--vocab-size", "9999"], "too large"),
    "end without tokenizer": (["a.txt", "--output", "corpus", "--end-of-document", "</s>"], "is for --tokenizer"),
    "no workers": (["a.txt", "--output", "corpus", "--workers", "0"], "0 workers are less than 1"),
    "folder without tokenizer": (["a.txt", "--output", "corpus", "--tokenizer", "."], "folder . holds no tokenizer"),
    "fraction": (["a.txt", "--output", "corpus", "--valid-fraction", "1"], "validation fraction 1.0"),
    "output is here": (["a.txt", "--output", "."], "never overwritten"),
    "output without a name": (["a.txt", "--output", ""], "argument --output: is empty; give a path"),
    "output is above": (["a.txt", "--output", ".."], "never overwritten"),
    "output is the root": (["a.txt", "--output", "/"], "never overwritten"),
    "output is a file": (["a.txt", "--output", "a.txt"], "never overwritten"),
    "output under a file": (["a.txt", "--output", "a.txt/corpus"], "cannot write corpus a.txt/corpus: "),
    "output by way of a file": (["a.txt", "--output", "a.txt/.."], "never overwritten"),
    "output too long": (["a.txt", "--output", "x" * 250], "File name too long"),
    "output much too long": (["a.txt", "--output", "x" * 300], "File name too long"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(main, tmp_path, monkeypatch, capsys, case):
    arguments, message = BAD_ARGUMENTS[case]
    (tmp_path / "a.txt").write_text("some text\n" * 20)
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert sorted(os.listdir(tmp_path)) == ["a.txt"]


def test_the_current_folder_is_not_replaced(main, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("some text\n" * 20)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "../here", "below/.."):
        assert main([str(tmp_path / "a.txt"), "--output", name]) == 2
        assert "is the current folder" in capsys.readouterr().err
    assert os.listdir(tmp_path / "here") == []
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "here"]
