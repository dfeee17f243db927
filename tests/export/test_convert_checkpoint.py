"""tools/convert_checkpoint.py: every form of a real run, whole and proven, or one line, an exit code, and nothing left.

Run: pytest tests/export/test_convert_checkpoint.py
"""

from __future__ import annotations

import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slope_dist.export.exporting import FORMS
from slope_dist.export.opening import form_of, open_model
from slope_dist.inference import load_model
from slope_dist.transfer import Transfer
from tests.distributed import run_ranks
from tests.programs import program
from tests.runs import STEPS, VOCAB_SIZE, small_corpus, train, write_config

TOOL = program("convert_checkpoint")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with adapters, in bf16."""
    base = tmp_path_factory.mktemp("run")
    run_ranks(train, 1, str(write_config(base, small_corpus(base), precision="bf16", model__init_std=0.03)))
    return base / "run"


@pytest.fixture(autouse=True)
def handlers() -> Any:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def convert(*arguments: object) -> int:
    return TOOL.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_back_and_asks_the_same(finished: Path, tmp_path: Path, form: str, capsys: Any) -> None:
    target = tmp_path / "made"
    assert convert(finished, "--to", form, "--output", target) == 0
    assert f"{target}: {form}, " in capsys.readouterr().out
    assert form_of(target) == form
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    tokens = torch.randint(VOCAB_SIZE, (2, 16))
    before, after = load_model(finished), load_model(target)
    assert after.tokenizer.same_ids(before.tokenizer)
    text = "words of  another\n\nlanguage, \u00e9\U0001f469"
    assert after.tokenizer.encode(text).tolist() == before.tokenizer.encode(text).tolist()
    bound = 0 if form != "hf" else 2.0**-6
    torch.testing.assert_close(after.logits(tokens), before.logits(tokens), rtol=bound, atol=bound)


@pytest.mark.parametrize("form", FORMS)
def test_the_output_may_be_called_like_a_checkpoint(finished: Path, tmp_path: Path, form: str) -> None:
    target = tmp_path / f"step-{STEPS:08d}"
    assert convert(finished, "--to", form, "--output", target) == 0
    assert form_of(target) == form
    assert load_model(target).stored.origin.form == form


@pytest.mark.parametrize("place", ["made", "deep/made", "../step-00000010/made"])
def test_the_output_is_not_put_into_the_model(finished: Path, tmp_path: Path, capsys: Any, place: str) -> None:
    source = tmp_path / f"step-{STEPS:08d}"
    shutil.copytree(finished / "checkpoints" / source.name, source)
    before = sorted(source.rglob("*"))
    assert "is in the folder of the model" in refused(capsys, 2, source, "--to", "hf", "--output", source / place)
    assert sorted(source.rglob("*")) == before
    # Beside its checkpoints a run has room for more.
    run = shutil.copytree(finished, tmp_path / "run")
    assert convert(run, "--to", "hf", "--output", run / "made") == 0
    assert open_model(run).origin.form == "checkpoint"


def test_forms_convert_to_each_other(finished: Path, tmp_path: Path) -> None:
    direct = tmp_path / "direct"
    assert convert(finished, "--to", "hf", "--output", direct) == 0
    for form in ("slope", "compressed"):
        assert convert(finished, "--to", form, "--output", tmp_path / form) == 0
        assert convert(tmp_path / form, "--from", form, "--to", "hf", "--output", tmp_path / f"{form}-hf") == 0
        for path in direct.rglob("*.safetensors"):
            again = tmp_path / f"{form}-hf" / path.relative_to(direct)
            expected, found = load_file(path), load_file(again)
            assert expected.keys() == found.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_another_dtype_and_merged_adapters(finished: Path, tmp_path: Path, capsys: Any) -> None:
    assert convert(finished, "--to", "hf", "--output", tmp_path / "m", "--merge-adapters", "--dtype", "fp32") == 0
    assert "sparsity is gone" in capsys.readouterr().out
    made = open_model(tmp_path / "m")
    assert made.dtype == torch.float32 and not made.has_adapters
    name = "decoder.layers.1.fc1"
    source = open_model(finished)
    assert torch.equal(made.dense(name), source.merged(name))
    assert float((made.dense(name) == 0).float().mean()) < 0.1 < float((source.dense(name) == 0).float().mean())


def test_help_says_what_it_does(capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        convert("--help")
    assert end.value.code == 0
    assert "slope-checkpoint" in capsys.readouterr().out


def flipped(source: Path, place: Path) -> Path:
    shutil.copytree(source / "checkpoints" / f"step-{STEPS:08d}", place)
    file = next(place.glob("*.weights.safetensors"))
    data = bytearray(file.read_bytes())
    data[-50] ^= 4
    file.write_bytes(data)
    return place


def refused(capsys: Any, code: int, *arguments: object) -> str:
    assert convert(*arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


def test_bad_input_is_one_line_and_leaves_nothing(finished: Path, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "out" / "made"
    to_hf = ("--to", "hf", "--output", target)
    unfinished = tmp_path / f"step-00000010.tmp-{'1' * 32}"
    shutil.copytree(finished / "checkpoints" / f"step-{STEPS:08d}", unfinished)
    (tmp_path / "nothing").mkdir()
    cases: list[tuple[str, tuple[object, ...]]] = [
        ("whose save did not end", (unfinished, *to_hf)),
        ("expected sha256", (flipped(finished, tmp_path / "step-00000010"), *to_hf)),
        ("holds no model", (tmp_path / "nothing", *to_hf)),
        ("cannot be opened", (tmp_path / "absent", *to_hf)),
        ("is not of the form hf; it looks like checkpoint", (finished, "--from", "hf", *to_hf)),
        ("name it with --tokenizer PATH", (finished, *to_hf, "--tokenizer", tmp_path / "absent")),
        ("holds no tokenizer", (finished, *to_hf, "--tokenizer", tmp_path / "nothing")),
        ("invalid choice: 'gguf'", (finished, "--to", "gguf", "--output", target)),
        ("--output is required", (finished, "--to", "hf")),
        ("--config is for --to slope-checkpoint", (finished, "--to", "slope-checkpoint")),
        ("--config is for --to slope-checkpoint", (finished, *to_hf, "--config", "x.json")),
        ("--set is for --config", (finished, *to_hf, "--set", "a=1")),
        (
            "--merge-adapters is for --to hf, not for --to slope",
            (finished, "--to", "slope", "--output", target, "--merge-adapters"),
        ),
        ("leaves no adapters to pad", (finished, *to_hf, "--merge-adapters", "--pad-adapters")),
        ("--prune-adapters is for --to slope", (finished, *to_hf, "--prune-adapters")),
        ("contradict", (finished, *to_hf, "--no-tokenizer", "--tokenizer", "x")),
    ]
    for expected, arguments in cases:
        assert expected in refused(capsys, 2, *arguments), arguments
        assert not target.parent.exists() or list(target.parent.iterdir()) == []


def test_an_adapter_of_another_base_is_refused(finished: Path, tmp_path: Path, capsys: Any) -> None:
    assert convert(finished, "--to", "hf", "--output", tmp_path / "made") == 0
    weights = load_file(tmp_path / "made" / "model.safetensors")
    weights["model.decoder.final_layer_norm.bias"] += 1
    save_file(weights, tmp_path / "made" / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    line = refused(capsys, 2, tmp_path / "made", "--to", "slope", "--output", tmp_path / "new")
    assert "adapter_model.safetensors is an adapter of another base" in line
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_nothing_is_overwritten_and_room_is_needed(
    finished: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made").mkdir()
    assert "is there already" in refused(capsys, 2, finished, "--to", "hf", "--output", tmp_path / "made")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10))
    assert "GB are needed" in refused(capsys, 2, finished, "--to", "slope", "--output", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("form", FORMS)
def test_an_interrupted_conversion_leaves_nothing(
    finished: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, form: str, number: int
) -> None:
    add = Transfer.add

    def interrupted(self: Transfer, size: int) -> None:
        add(self, size)
        if any(tmp_path.rglob("*.safetensors")):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Transfer, "add", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert convert(finished, "--to", form, "--output", tmp_path / "made") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMS)
def test_what_reads_back_as_something_else_is_not_kept(
    finished: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    from slope_dist.export import exporting

    def opened(path: Path) -> Any:
        made = open_model(path)
        read = made.read

        def wrong(name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
            found = read(name, start, stop)
            return found + 1 if name == "decoder.layers.1.fc2.bias" else found

        monkeypatch.setattr(made, "read", wrong)
        return made

    monkeypatch.setattr(exporting, "open_model", opened)
    line = refused(capsys, 1, finished, "--to", form, "--output", tmp_path / "made")
    assert "decoder.layers.1.fc2.bias: what was written reads back as something else" in line
    assert list(tmp_path.iterdir()) == []
