"""Claim: tools/inspect_checkpoint.py reports, verifies, hashes and compares what it is given; a damaged checkpoint is
one line and exit code 1, a wrong command line or folder one line and 2; and no text of a checkpoint reaches a terminal
as a control code.

Run alone: python -m pytest tests/checkpoint/test_inspect_checkpoint.py
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.programs import output_to, run_python

from .rewriting import STEP, folder_of, make_run, rewrite
from .test_reader import flip, reseal

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "inspect_checkpoint.py"
VALUES = "weight/decoder.layers.0.fc1.weight.values"


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("inspect_checkpoint", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def main(tool: Any, capsys: pytest.CaptureFixture[str]) -> Main:
    """Exit code, stdout and stderr of the command."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = tool.main([str(argument) for argument in arguments])
        output, errors = capsys.readouterr()
        assert "Traceback" not in errors
        return code, output, errors

    return run


def process(*arguments: object, **keywords: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(TOOL), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As most shells have it; an unbuffered pipe would be found closed at once.
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        **keywords,
    )


def test_the_command_reports_a_run(base: Path, tmp_path: Path) -> None:
    run = make_run(base, "data")
    ended = process(run, "--verify", cwd=tmp_path)
    output, errors = ended.communicate()
    assert (ended.returncode, errors) == (0, "")
    lines = output.splitlines()
    assert lines[-1] == "verifies"
    assert all(line == line.rstrip() and line.isprintable() for line in lines)
    facts = dict(line.split("  ", 1) for line in lines if re.match("[a-z]", line) and "  " in line)
    facts = {name: text.strip() for name, text in facts.items()}
    assert facts["checkpoint"] == str(run / "checkpoints" / "step-00000002")
    assert (facts["step"], facts["phase"]) == ("2", "adapters on, rank 8")
    assert "engine deepspeed, zero stage 1, tensor 1, pipeline 1" in facts["layout"]
    assert "precision fp32; files of 2 ranks" in facts["layout"]
    assert "2 of weights" in facts["files"] and "2 of optimizer" in facts["files"]
    assert "(x 1.0625)" in facts["pruned weights"] and "(x 0.5312)" in facts["pruned weights"]
    assert facts["their optimizer"].endswith("(x 0.5000)")
    [row] = [line.split() for line in lines if "decoder.layers.0.fc2 " in line]
    assert row[:4] == ["decoder.layers.0.fc2", "[32,", "64]", "2:4"] and row[4:7] == ["F32", "50.00", "%"]
    assert row[-2:] == ["rank", "8"]
    [row] = [line.split() for line in lines if "decoder.layers.0.self_attn.q_proj " in line]
    assert row[3:7] == ["dense", "F32", "100.00", "%"] and row[-1] != "8"


def test_a_reader_that_has_seen_enough_is_no_error(base: Path) -> None:
    folder = folder_of(base, "data")
    # More than a buffer, and less: then the pipe is found closed at the very end.
    for options in (["--hashes"], ["--diff", folder]):
        ended = process(folder, *options)
        assert ended.stdout is not None and ended.stderr is not None
        ended.stdout.close()
        assert (ended.stderr.read(), ended.wait()) == ("", 0)


def test_a_difference_is_one_whoever_reads_it(base: Path) -> None:
    ended = process(folder_of(base, "data"), "--diff", folder_of(base, "mask"))
    assert ended.stdout is not None and ended.stderr is not None
    ended.stdout.close()
    assert (ended.stderr.read(), ended.wait()) == ("", 1)


def test_an_output_without_room_is_no_difference(base: Path) -> None:
    folder = folder_of(base, "data")
    with output_to("a full device") as output:
        ended = run_python(TOOL, folder, "--diff", folder, stdout=output)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert ended.stderr.startswith("error: standard output cannot be written: ")


def test_hashes_are_lines_and_one_over_them(main: Main, base: Path) -> None:
    folder = folder_of(base, "bf16")
    code, output, _ = main(folder, "--hashes")
    *lines, last = output.splitlines()
    assert code == 0 and len(lines) == len(json.loads((folder / "manifest.json").read_bytes())["tensors"])
    over_them = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    assert last == f"{over_them}  all {len(lines)}"
    code, output, _ = main(folder, "--hashes", "--json")
    content = json.loads(output)
    assert [f"{digest}  {key}" for key, digest in content["hashes"].items()] == lines
    assert content["all"] == last.split()[0]


def test_json_is_the_report(main: Main, base: Path) -> None:
    code, output, errors = main(folder_of(base, "mask"), "--json", "--verify")
    content = json.loads(output)
    assert (code, errors, content["step"], content["verifies"]) == (0, "", STEP, True)
    assert content["config"]["sparsity"]["column_mask_interval"] == 4
    row = next(row for row in content["layers"] if row["name"] == "decoder.layers.1.fc1")
    assert row["shape"] == [64, 32] and row["stored"] == "2:4" and row["kept"] == row["stored_elements"] == 1024
    assert row["adapter_rank"] == 8 and 0 < row["column_kept"] < 1024 and row["norm"] > 0
    assert content["totals"]["files"]["weights"][0] == 1


def test_a_difference_is_shown_and_told_by_the_exit_code(main: Main, base: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], content: dict[str, Any]) -> None:
        tensors[VALUES][0, 0] += 1
        content["config"]["parallel"]["tensor"] = 2

    folder = folder_of(base, "data")
    code, output, _ = main(folder, "--diff", rewrite(folder, tmp_path / "same"))
    assert code == 0 and re.search(r"^equal in every logical tensor \([0-9]+\)$", output, re.MULTILINE)
    other = rewrite(folder, tmp_path / "other", change)
    code, output, _ = main(folder, "--diff", other, "--verify")
    assert code == 1 and "\nconfig.parallel.tensor: 2 there, 1 here\n" in output
    assert re.search(rf"^ {re.escape(VALUES)} +1 of 1,024 +1 +[0-9.]+$", output, re.MULTILINE)
    code, output, _ = main(folder, "--diff", other, "--json")
    content = json.loads(output)
    assert code == 1 and not content["equal"] and content["fields"] == [
        {"path": ["config", "parallel", "tensor"], "there": 2, "here": 1}
    ]  # fmt: skip
    assert [row["key"] for row in content["tensors"]] == [VALUES]
    code, output, _ = main(folder, "--diff", folder_of(base, "dense"))
    assert code == 1 and f"\nonly here: metadata/{VALUES[7:-6]}indices\n" in output


def test_the_newest_that_verifies_is_taken(main: Main, base: Path, tmp_path: Path) -> None:
    run = shutil.copytree(make_run(base, "dense"), tmp_path / "run")
    checkpoints = run / "checkpoints"
    newest = shutil.copytree(checkpoints / "step-00000002", checkpoints / "step-00000003")
    (checkpoints / f"step-00000004.tmp-{'0' * 32}").mkdir()
    reseal(newest, lambda content: content.update(step=3))
    for given in (run, checkpoints):
        assert json.loads(main(given, "--json")[1])["step"] == 3
    flip(newest / "rank-00000.weights.safetensors", -1, 0)
    for given in (run, checkpoints):
        code, output, errors = main(given, "--json")
        assert code == 0 and json.loads(output)["step"] == 2
        assert [line.split(": ")[:2] for line in errors.splitlines()] == [
            ["skipped", str(checkpoints / f"step-00000004.tmp-{'0' * 32}")],
            ["skipped", str(newest)],
        ]
        assert [f"skipped: {line}" for line in json.loads(output)["skipped"]] == errors.splitlines()
    # By its own folder it is looked at, and refused if asked for.
    assert main(newest)[0] == 0
    code, output, errors = main(newest, "--verify")
    assert (code, output) == (1, "") and errors.count("\n") == 1
    assert errors.startswith(f"error: {newest}: rank-00000.weights.safetensors: expected sha256")
    shutil.rmtree(checkpoints / "step-00000002")
    code, output, errors = main(run)
    assert (code, output) == (1, "") and "no checkpoint verifies" in errors and str(newest) in errors


def truncate(folder: Path) -> None:
    os.truncate(folder / "rank-00000.weights.safetensors", 100)


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def bad_seal(folder: Path) -> None:
    flip(folder / "manifest.json", 200, 1)


def other_header(folder: Path) -> None:
    data = (folder / "rank-00000.weights.safetensors").read_bytes()
    (folder / "rank-00000.weights.safetensors").write_bytes(data.replace(b'"F32"', b'"I32"', 1))


def nested(folder: Path) -> None:
    data = (folder / "manifest.json").read_bytes()
    body = data[:-78].replace(b'"config":{', b'"config":{"deep":' + b"[" * 900 + b"]" * 900 + b",", 1)
    seal = f',"sha256":"{hashlib.sha256(body).hexdigest()}"}}\n'.encode()
    (folder / "manifest.json").write_bytes(body + seal)


@pytest.mark.parametrize("spoil", [truncate, no_manifest, bad_seal, other_header, nested])
def test_damage_is_one_line_without_being_asked_for(
    main: Main, base: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    folder = shutil.copytree(folder_of(base, "dense"), tmp_path / "step-00000002")
    spoil(folder)
    for options in ([], ["--verify"], ["--hashes"], ["--json"], ["--diff", folder_of(base, "dense")]):
        code, output, errors = main(folder, *options)
        assert (code, output) == (1, "")
        assert errors.startswith(f"error: {folder}: ") and errors.count("\n") == 1 and errors[:-1].isprintable()
        assert "expected" in errors


@pytest.mark.parametrize(
    "arguments, text",
    [
        ([], "DIR"),
        (["absent"], "absent cannot be opened: No such file or directory"),
        (["file"], "file cannot be opened: Not a directory"),
        (["empty"], "is no checkpoint, and holds none"),
        (["empty", "--wrong"], "--wrong"),
        (["empty", "more"], "more"),
        (["empty", "--hash"], "--hash"),
        (["empty", "--diff"], "--diff"),
        (["empty", "--diff", "empty", "--hashes"], "not allowed with"),
        (["good", "--diff", "absent"], "absent cannot be opened"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_2(
    main: Main, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], text: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "good").symlink_to(folder_of(base, "dense"))
    monkeypatch.chdir(tmp_path)
    code, output, errors = main(*arguments)
    assert (code, output) == (2, "") and errors.startswith("error: ") and errors.count("\n") == 1
    assert text in errors


def test_what_may_not_be_read_is_not_called_damaged(main: Main, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("slope_dist.checkpoint.reader.os.listdir", refuse)
    code, output, errors = main(str(base.parent))
    assert code == 2 and output == "" and "Permission denied" in errors


def test_control_c_is_one_line(tool: Any, main: Main, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "measure_layers", interrupted)
    assert main(folder_of(base, "dense")) == (130, "", "interrupted\n")


HOSTILE = "\x1b[2J\x9b31m\u202e\ud800\x7f\r\n\x07[red]:bomb:[/] \\"


def test_no_text_of_a_checkpoint_obeys_a_terminal(main: Main, base: Path, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["scalars"] |= {"adapters": HOSTILE, "adapter_rank": {HOSTILE: [HOSTILE]}, HOSTILE: {HOSTILE: HOSTILE}}
        content["identity"][HOSTILE] = HOSTILE
        content["versions"][HOSTILE] = HOSTILE + "v" * 10**6
        content["config"] |= {"precision": HOSTILE, HOSTILE: "x" * 10**6, "k" * 10**6: HOSTILE}
        content["config"]["parallel"] |= {"engine": HOSTILE, "tensor": [HOSTILE], "data": 10**300}

    folder = shutil.copytree(folder_of(base, "dense"), tmp_path / "step-00000002")
    content = json.loads((folder / "manifest.json").read_bytes())
    del content["sha256"]
    change(content)
    body = json.dumps(content)[:-1].encode()
    seal = f',"sha256":"{hashlib.sha256(body).hexdigest()}"}}\n'.encode()
    (folder / "manifest.json").write_bytes(body + seal)
    hostile = shutil.copytree(folder, tmp_path / "h\x1b[2J" / "step-00000002")
    for options in ([], ["--verify"], ["--hashes"], ["--json"], ["--diff", folder_of(base, "dense")]):
        for arguments in ([hostile, *options], [hostile, *options, "--json"]):
            code, output, errors = main(*arguments)
            assert (code, errors) == (0, "")
            assert all(character == "\n" or character.isprintable() for character in output)
            assert len(output) < 10**5 or "--json" in arguments
    found = json.loads(main(hostile, "--json")[1])
    assert found["identity"][HOSTILE] == HOSTILE and found["config"]["parallel"]["data"] == 10**300
    assert "[red]:bomb:[/]" in main(hostile)[1]
    # A pattern that cannot be one is quoted by the report and by the refusal.
    folder = rewrite(folder_of(base, "data"), tmp_path / "data")
    reseal(folder, lambda content: content["config"]["sparsity"].update(pattern=HOSTILE))
    code, output, _ = main(folder)
    assert code == 0 and output.count("does not fit together: metadata/decoder.layers") == 9
    assert len(json.loads(main(folder, "--json")[1])["problems"]) == 9
    assert all(character == "\n" or character.isprintable() for character in output)
    code, output, errors = main(folder, "--verify")
    assert (code, output, errors.count("\n")) == (1, "", 1) and errors[:-1].isprintable()
