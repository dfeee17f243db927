"""Claim: tools/generate.py continues prompts from wherever they come, prints texts as they come, in the order of their
prompts, and answers what it cannot use with one line and exit code 2.

Run: pytest tests/inference/test_generate.py
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slope_dist.inference import InferenceModel, load_model
from slope_dist.inference.generation import Continuation, Generation, Spelling, prompt_ids
from slope_dist.inference.sampling import Sampling
from tests.inference.conftest import ROOT, Tool

TOOL = ROOT / "tools" / "generate.py"
SPEED = re.compile(
    r"prefill [\d,]+ tokens in [\d.]+ s \([\d,.]+ tokens/s\)(, decode [\d,]+ tokens in [\d.]+ s \([\d,.]+ tokens/s\))?"
)


def expected(run: Path, prompt: str, new: int = 8) -> str:
    """What the run's model says, greedily."""
    model = load_model(run)
    end = model.tokenizer.end_of_document
    generation = Generation(model, [prompt_ids(model.tokenizer, prompt)], max_new_tokens=new, end=end)
    spelling = Spelling(model.tokenizer)
    return "".join(spelling.add(token) for _, token in generation if token is not None) + spelling.end()


def rows_of(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def test_a_text_and_the_speed(run: Path, generate: Tool) -> None:
    code, output, errors = generate(run, "--prompt", "abc de", "--max-new-tokens", 8)
    assert (code, output) == (0, expected(run, "abc de") + "\n")
    assert SPEED.fullmatch(errors.strip())


def test_several_prompts_in_their_order(run: Path, generate: Tool) -> None:
    prompts = ["abc de", "p", "on\tm " * 5]
    arguments = [part for prompt in prompts for part in ("--prompt", prompt)]
    code, output, _ = generate(run, *arguments, "--max-new-tokens", 8, "--batch", 2)
    texts = [f"--- {n}: {prompt!r}\n{expected(run, prompt)}\n" for n, prompt in enumerate(prompts, start=1)]
    assert code == 0
    assert output == "".join(texts).replace("'", "")


def test_json_has_all_that_is_known(run: Path, generate: Tool) -> None:
    code, output, errors = generate(run, "--prompt", "abc de", "--prompt", "", "--max-new-tokens", 8, "--json")
    assert code == 0
    first, second = rows_of(output)
    tokenizer = load_model(run).tokenizer
    assert first["text"] == expected(run, "abc de")
    assert b"".join(tokenizer.pieces[token] for token in first["ids"]).decode(errors="replace") == first["text"]
    assert first["prompt_tokens"] == len(tokenizer.encode("abc de"))
    assert first["stopped"] in ("length", "end of document")
    # An empty one begins a document.
    assert (second["prompt"], second["prompt_tokens"]) == ("", 1)
    assert SPEED.fullmatch(errors.strip())


def test_no_cache_and_batch_change_nothing(run: Path, generate: Tool) -> None:
    how = ("--prompt", "abc", "--prompt", "de fg hi", "--temperature", 1, "--top-k", 50, "--seed", 3, "--json")
    code, output, _ = generate(run, *how)
    assert code == 0
    for other in (("--no-cache",), ("--batch", 1)):
        assert generate(run, *how, *other)[:2] == (0, output)
    assert generate(run, *how[:-2], 4, "--json")[1] != output


def test_the_context_is_noted_where_it_is_full(run: Path, generate: Tool) -> None:
    how = ("--max-new-tokens", 100, "--temperature", 5, "--json")
    code, output, errors = generate(run, "--prompt", "abc", *how)
    (row,) = rows_of(output)
    assert code == 0
    assert (row["stopped"], row["prompt_tokens"] + len(row["ids"])) == ("context", 64)
    assert errors.startswith("note: the text stopped where the model's context of 64 tokens is full\n")
    errors = generate(run, "--prompt", "abc", "--prompt", "de", *how)[2]
    assert errors.startswith("note: 2 of 2 texts stopped where")


def test_prompts_from_files_and_standard_input(
    run: Path, generate: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("abc de\r\n\nfg é\n")
    rows.write_text('"abc de"\n\n{"prompt": "fg\\né", "other": 1}\n')
    for path, prompts in ((lines, ["abc de", "", "fg é"]), (rows, ["abc de", "fg\né"])):
        code, output, _ = generate(run, "--prompt-file", path, "--json", "--max-new-tokens", 2)
        assert (code, [row["prompt"] for row in rows_of(output)]) == (0, prompts)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("two\nlines é\n".encode())))
    code, output, _ = generate(run, "--json", "--max-new-tokens", 2)
    assert (code, [row["prompt"] for row in rows_of(output)]) == (0, ["two\nlines é"])
    typed = io.TextIOWrapper(io.BytesIO(b"ab"))
    monkeypatch.setattr(typed, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", typed)
    code, output, errors = generate(run, "--json", "--max-new-tokens", 2)
    assert (code, [row["prompt"] for row in rows_of(output)]) == (0, ["ab"])
    assert errors.startswith("note: the prompt is read from the terminal")
    # As Python has it where a shell has closed it.
    monkeypatch.setattr(sys, "stdin", None)
    code, output, errors = generate(run)
    assert (code, output) == (2, "")
    assert errors == "error: standard input is closed; give --prompt or --prompt-file\n"


def test_another_dtype(run: Path, generate: Tool) -> None:
    code, output, _ = generate(run, "--prompt", "abc", "--max-new-tokens", 4, "--dtype", "bf16", "--json")
    assert code == 0
    assert len(rows_of(output)) == 1


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, "x\\x1b[2J\ty\\x9b\n"), (False, "x\x1b[2J\ty\x9b\n")])
def test_a_terminal_is_not_steered(
    generate: Tool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    is_terminal: bool,
    shown: str,
) -> None:
    """The text comes as it is to a pipe, and with escapes to a terminal."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    printer = generate.module.Printer(["a"], as_json=False)
    printer.add(0, "x\x1b[2J\ty\x9b\n")
    assert capsys.readouterr().out == shown


def test_what_was_kept_back_comes_as_soon_as_its_turn_is(generate: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    printer = generate.module.Printer(["a", "b", "c"], as_json=False)
    done = Continuation([1], Sampling().generator([1]), [2], "length")
    printer.add(1, "two")
    printer.add(0, "one")
    printer.end(2, done)
    assert capsys.readouterr().out == "--- 1: a\none"
    printer.end(0, done)
    assert capsys.readouterr().out == "\n--- 2: b\ntwo"
    printer.end(1, done)
    assert capsys.readouterr().out == "\n--- 3: c\n\n"


def test_a_character_that_is_not_finished_is_printed_as_such(
    model: InferenceModel, generate: Tool, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = [token for token, piece in enumerate(model.tokenizer.pieces) if len(piece) == 1 and piece[0] >= 0xC2]

    def draw(seed: int) -> Generation:
        sampling = Sampling(temperature=9, seed=seed)
        return Generation(model, [[1]], max_new_tokens=1, end=None, sampling=sampling)

    seed = next(seed for seed in range(1000) if next(iter(draw(seed)))[1] in begun)
    generate.module._follow(draw(seed), model, generate.module.Printer(["a"], as_json=False), 0)
    assert capsys.readouterr().out == "\ufffd\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--prompt-file", "b"], "argument --prompt-file: not allowed with argument --prompt"),
        (["--prompt", "a", "--top-k", "5"], "--top-k: without a --temperature above 0 nothing is drawn"),
        (["--prompt", "a", "--seed", "5", "--temperature", "0"], "--seed: without a --temperature above 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature -1.0 is out of range"),
        (["--prompt", "a", "--temperature", "1", "--top-p", "2"], "top-p 2.0 is out of range"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0 is less than 1"),
        (["--prompt", "a", "--batch", "0"], "--batch 0 is less than 1"),
        (["--prompt", "a", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--prompt", "a", "--device", "cuda"], "device cuda is not there"),
        (["--prompt", "a\udc80"], "--prompt 'a\\udc80' is not text"),
        (["--prompt", "ab " * 200], "the prompt has 401 tokens"),
        (["--prompt", "a", "--prompt", "ab " * 200], "prompt 2 has 401 tokens"),
        (["--prompt-file", "{tmp}/none"], "cannot read {tmp}/none: No such file or directory"),
        (["--prompt-file", "{tmp}/empty.txt"], "{tmp}/empty.txt holds no prompt"),
        (["--prompt-file", "{tmp}/blank.jsonl"], "{tmp}/blank.jsonl holds no prompt"),
        (["--prompt-file", "{tmp}/latin.txt"], "{tmp}/latin.txt is not UTF-8 text: bad byte at offset 1"),
        (["--prompt-file", "{tmp}/bad.jsonl"], "{tmp}/bad.jsonl:2 is not JSON"),
        (["--prompt-file", "{tmp}/number.jsonl"], "{tmp}/number.jsonl:1 is neither a JSON string nor an object"),
        (["--prompt-file", "{tmp}/half.jsonl"], "{tmp}/half.jsonl:1 is not text"),
        (["--prompt", "a", "--tokenizer", "{tmp}/none"], "the tokenizer of "),
    ],
)
def test_what_cannot_be_used_is_one_line(
    run: Path, generate: Tool, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes(b"a\xe9")
    (tmp_path / "bad.jsonl").write_text('"a"\n{\n')
    (tmp_path / "number.jsonl").write_text("5\n")
    (tmp_path / "half.jsonl").write_text('"\\ud800"\n')
    if message.startswith("device") and os.path.exists("/dev/nvidia0"):
        pytest.skip("there is a GPU")
    code, output, errors = generate(run, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert (code, output) == (2, "")
    (line,) = errors.splitlines()
    assert line.startswith(f"error: {message.format(tmp=tmp_path)}")


@pytest.mark.parametrize("name", ["none", "empty"])
def test_no_model_is_one_line(generate: Tool, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    code, output, errors = generate(tmp_path / name, "--prompt", "a")
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert str(tmp_path / name) in errors


def test_a_damaged_checkpoint_is_one_line(run: Path, generate: Tool, tmp_path: Path) -> None:
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    copy = Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))
    (weights,) = copy.glob("*.weights.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    code, output, errors = generate(copy, "--prompt", "a")
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert "expected sha256" in errors


def test_a_reader_that_leaves_is_no_error(run: Path) -> None:
    arguments = ["--prompt", "abc", "--max-new-tokens", "50", "--temperature", "5"]
    program = subprocess.Popen(
        [sys.executable, str(TOOL), str(run), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
    )
    assert program.stdout is not None and program.stderr is not None
    # The first token is there before the last is known.
    assert program.stdout.read(1)
    program.stdout.close()
    errors = program.stderr.read().decode()
    assert program.wait() == 0, errors
    assert "Traceback" not in errors and "Exception" not in errors
