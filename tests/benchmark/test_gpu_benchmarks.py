"""gemm, block, step, decode and refresh end to end, on the CPU: results, table, picture, and taking results up again.

Run: pytest tests/benchmark/test_gpu_benchmarks.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from slope_dist.benchmark import gemm, machine, timing
from slope_dist.config import load_config
from slope_dist.sparse import kernels, reference
from tests.distributed import ROOT
from tests.programs import program

SIZES = {
    "gemm": ("--tokens", "1", "128", "--tensor", "1", "2"),
    "block": ("--tokens", "32"),
    "step": ("--tokens", "32", "--layers", "1"),
    "decode": ("--prompt", "8", "--prefill", "16", "--batches", "1", "2"),
    "refresh": ("--tokens", "32"),
}
CELLS = {"gemm": 15, "block": 1, "step": 1, "decode": 3, "refresh": 1}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/benchmark.py, in a setting that does not change while files are edited."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setattr(machine, "commit", lambda: "abc")
    monkeypatch.setattr(machine, "changes", lambda: None)
    return program("benchmark")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    sections = json.loads((ROOT / "configs" / "tiny.json").read_text())
    sections["model"] |= {"hidden_size": 32, "ffn_size": 64, "num_heads": 2, "num_layers": 2, "sequence_length": 32}
    path = tmp_path / "small.json"
    path.write_text(json.dumps(sections))
    return path


def options(name: str, config: Path, output: Path) -> list[str]:
    common = ("--device", "cpu", "--threads", "1", "--seconds", "0", "--configs", str(config), "--output", str(output))
    return [name, *common, *SIZES[name]]


def rows(output: Path) -> list[dict]:
    return json.loads(output.read_text())["rows"]


@pytest.mark.parametrize("name", SIZES)
def test_a_command_from_end_to_end_and_again(
    name: str, tool: ModuleType, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    assert tool.main(options(name, config, output)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("(CPU, 1 threads; says nothing of a GPU)", f"{CELLS[name]} cells measured, 0 were there", "small"):
        assert text in printed or (name == "gemm" and text == "small")
    content = json.loads(output.read_text())
    assert content["benchmark"] == name and content["machine"]["kind"] == "cpu"
    assert {"device", "threads", "torch", "commit", "python"} <= content["machine"].keys()
    assert len(content["rows"]) == CELLS[name] == len({row["cell"] for row in content["rows"]})
    with Image.open(tmp_path / "results.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
        picture.load()
    before = output.read_bytes()
    assert tool.main(options(name, config, output)) == 0
    assert f"0 cells measured, {CELLS[name]} were there" in capsys.readouterr().out
    assert output.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.png", "small.json"]


@pytest.mark.parametrize("name", SIZES)
def test_a_command_through_a_dispatcher(
    name: str, tool: ModuleType, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, but for its libraries: products are the dispatcher's, and it is part of the setting."""
    monkeypatch.setattr(kernels.primitives, "why_no_triton", lambda device_type: "not here")
    dispatcher = kernels.Dispatcher(torch.device("cpu"), timer=lambda calls, device, cold: dict.fromkeys(calls, 1.0))
    monkeypatch.setattr(tool.gpu_benchmarks, "_dispatcher", lambda *arguments: dispatcher)
    monkeypatch.setattr(reference, "forward", lambda *arguments: pytest.fail("the reference was timed"))
    output = tmp_path / "results.json"
    assert tool.main(options(name, config, output)) == 0
    assert len(rows(output)) == CELLS[name] and dispatcher.as_data()
    assert json.loads(output.read_text())["machine"]["arrangement"] == "kept"
    assert kernels.active() is None, "it was in use for the command alone"


def test_no_minutes_measure_one_cell(
    tool: ModuleType, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    for done in (1, 2):
        assert tool.main([*options("gemm", config, output), "--minutes", "0"]) == 0
        assert f"1 cells measured, {done - 1} were there, {15 - done} left for the next run" in capsys.readouterr().out
        assert len(rows(output)) == done
    assert [row["cell"] for row in rows(output)] == [
        "forward 32 x 64, 1 tokens, bfloat16",
        "forward 64 x 32, 1 tokens, bfloat16",
    ]


def test_an_interrupt_keeps_what_is_done(
    tool: ModuleType,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "results.json"
    right, calls = gemm.measure, []

    def interrupted(case: gemm.Case, *arguments: object) -> dict:
        calls.append(str(case))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(case, *arguments)

    monkeypatch.setattr(gemm, "measure", interrupted)
    assert tool.main(options("gemm", config, output)) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert [row["cell"] for row in rows(output)] == calls[:2]
    calls[:] = ["no third call", *calls[:2]]
    assert tool.main(options("gemm", config, output)) == 0
    assert len(rows(output)) == 15 and len(calls) == 3 + 13


def test_a_killed_run_goes_on(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    command = [sys.executable, "tools/benchmark.py", *options("gemm", config, output), "--seconds", "0.2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while not output.exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = [row["cell"] for row in rows(output)]
    assert 1 <= len(done) < 15
    again = subprocess.run([*command, "--minutes", "0"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert [row["cell"] for row in rows(output)][:-1] == done and f"{len(done)} were there" in again.stdout


def test_another_setting_is_refused_unless_fresh(
    tool: ModuleType,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "results.json"
    command = [*options("gemm", config, output), "--minutes", "0"]
    assert tool.main(command) == 0
    before = output.read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(machine, "commit", lambda: "def")
    assert tool.main(command) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == (
        f'error: {output} was measured in another setting: commit was "abc" and is "def"; name another --output, or '
        "give --fresh to replace it\n"
    )
    assert output.read_bytes() == before
    assert tool.main([*command, "--fresh"]) == 0
    assert json.loads(output.read_text())["machine"]["commit"] == "def" and len(rows(output)) == 1


@pytest.mark.parametrize("name", SIZES)
def test_a_wrong_rival_is_no_result(
    name: str,
    tool: ModuleType,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *arguments: right(*arguments) * 1.02)
    output = tmp_path / "results.json"
    assert tool.main(options(name, config, output)) == 1
    printed = capsys.readouterr().err
    assert "wrong result" in printed and "is off the dense masked product" in printed
    # The derived input gradient of gemm is another product, but a cell with one wrong rival has no row.
    assert not output.exists()


def test_a_cell_that_fails_is_in_the_results_and_tried_again_when_asked(
    tool: ModuleType,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "results.json"
    right = gemm.measure

    def failing(case: gemm.Case, *arguments: object) -> dict:
        if case.matrix.rows == 64:
            raise RuntimeError("CUDA error: invalid argument\na trace")
        return right(case, *arguments)

    monkeypatch.setattr(gemm, "measure", failing)
    assert tool.main(options("gemm", config, output)) == 1
    printed = capsys.readouterr()
    assert printed.err == (
        "not measured: 3 cells, the first: forward 64 x 32, 1 tokens, bfloat16: RuntimeError: CUDA error: invalid "
        "argument\n"
    )
    assert len(rows(output)) == 15 and sum("not_measured" in row for row in rows(output)) == 3
    monkeypatch.setattr(gemm, "measure", right)
    assert tool.main(options("gemm", config, output)) == 0
    assert "0 cells measured" in capsys.readouterr().out
    assert tool.main([*options("gemm", config, output), "--again"]) == 0
    assert len(rows(output)) == 15 and not any("not_measured" in row for row in rows(output))


def test_benchmarks_of_a_folder_share_their_choices(
    tool: ModuleType, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "find_vendors", lambda *arguments: None)
    monkeypatch.setattr(kernels, "Dispatcher", lambda device, vendors, store, arrangement: store)
    paths = set()
    for name in ("block", "step", "refresh"):
        parsed = tool.parse(options(name, config, tmp_path / f"{name}-card.json"))
        paths.add(tool.gpu_benchmarks._dispatcher(parsed, torch.device("cuda", 0)).path)
    assert paths == {tmp_path / "choices.json"}


@pytest.mark.parametrize("name", ["block", "step", "refresh"])
def test_models_of_each_width_with_a_goal_come_first(name: str, tool: ModuleType) -> None:
    configs = [str(ROOT / "configs" / f"{model}.json") for model in tool.gpu_benchmarks.MODELS]
    parsed = tool.parse([name, "--device", "cpu", "--configs", *configs])
    order = [model for model, _, _ in tool.gpu_benchmarks._trained(parsed)]
    assert order == ["opt66b", "opt6.7b", "opt13b", "opt30b", "llama3-8b", "mistral-7b", "opt2.7b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gemm", "--tokens", "0"], "--tokens 0 is less than 1"),
        (["gemm", "--tensor", "-1"], "--tensor -1 is less than 1"),
        (["gemm", "--minutes", "-1"], "--minutes -1.0 is not a time"),
        (["gemm", "--minutes", "nan"], "--minutes nan is not a time"),
        (["block", "--seconds", "inf"], "--seconds inf is not a time"),
        (["block", "--tokens", "40"], "--tokens 40 is no multiple of 32"),
        (["refresh", "--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["step", "--layers", "0"], "--layers 0 is less than 1"),
        (["step", "--configs", "no/such.json"], "no/such.json"),
        (["decode", "--prompt", "32"], "--prompt 32 is not below 32, the length of small"),
        (["decode", "--batches", "0"], "--batches 0 is less than 1"),
        (["gemm", "--vendors", "mkl"], "invalid choice: 'mkl'"),
        (["gemm", "--output", "no/such/folder/x.json"], "there is no folder no/such/folder"),
        (["gemm", "--plot", "no/such/folder/x.png"], "there is no folder no/such/folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_refused_in_one_line(
    arguments: list[str], message: str, tool: ModuleType, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *others = arguments
    assert tool.main([name, "--device", "cpu", "--configs", str(config), *others]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and message in printed.err and printed.err.count("\n") == 1


def test_what_cannot_be_measured_is_said_before_anything_is(tool: ModuleType, config: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    assert tool.main([*options("block", config, output), "--tokens", "32", "40"]) == 2
    assert not output.exists()


def test_a_damaged_file_is_refused_in_one_line(
    tool: ModuleType, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    output.write_text('{"benchmark": "gemm", "mach')
    assert tool.main(options("gemm", config, output)) == 2
    printed = capsys.readouterr().err
    assert "is no file of results, or a damaged one" in printed and printed.count("\n") == 1


def test_cuda_is_not_promised_where_there_is_none(
    tool: ModuleType, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool.torch.cuda, "is_available", lambda: False)
    assert tool.main(["gemm", "--device", "cuda", "--configs", str(config)]) == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "known"), [("bf16", True), ("fp16", True), ("fp32", False)])
def test_the_bound_is_that_of_16_bits(
    dtype: str, known: bool, tool: ModuleType, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tool.torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    made = argparse.Namespace(
        device="cuda", dtype=dtype, tokens=[128], tensor=[1], seconds=0, loaded=[("small", load_config(config))]
    )
    cells = list(tool.gpu_benchmarks.gemm_cells(made, None))
    assert cells and all((cell.measure.args[-1] is not None) == known for cell in cells)


@pytest.mark.parametrize(("mfu", "shown"), [(0.4123, "41.2 %"), (None, "-")], ids=["known", "unknown"])
def test_mfu_has_a_column(mfu: float | None, shown: str, tool: ModuleType) -> None:
    rival = dict.fromkeys(("seconds", "host_seconds", "ratio", "state_bytes", "tokens_per_second"), 1.0)
    rival |= {"peak_bytes": None, "adapter_rank": 0, "why_eager": None, "host_excess": None, "mfu": mfu}
    row = {"config": "small", "layers": 1, "layers_of_model": 2, "tokens": 8, "recompute": "blocks"}
    row |= {"rivals": {"dense": rival}}
    table = tool.gpu_benchmarks.tables.step_table(
        [row], {"device": "a card", "kind": "cuda", "torch": "2", "threads": 1, "vendors": {"cuSPARSELt": "0.8.0"}}
    )
    assert "{'cuSPARSELt': '0.8.0'}" in str(table.title)
    [column] = [column for column in table.columns if column.header == "MFU"]
    assert list(column.cells) == [shown] and len(table.columns) == 15
    assert list(table.columns[1].cells) == ["1 of 2, recomputed"]


@pytest.mark.parametrize("name", ["block", "step"])
def test_the_hosts_time_beside_dense_is_a_share_of_the_step(
    name: str, tool: ModuleType, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the times of a card made up: dense takes the host 2 ms of 10, twice 3 on average in `step`, 2:4 5 of 8."""
    dense = itertools.cycle([0.002, 0.004] if name == "step" else [0.002])

    def timed(rivals: Mapping[str, object], *arguments: object) -> dict[str, timing.Timing]:
        def of(rival: str) -> timing.Timing:
            seconds, host = (0.010, next(dense)) if rival.startswith("dense") else (0.008, 0.005)
            return timing.Timing([seconds] * 5, [seconds / 0.010] * 5, [1.0] * 5, [host] * 5)

        return {rival: of(rival) for rival in rivals}

    monkeypatch.setattr(timing, "in_turns", timed)
    right = timing.host_excess
    card = torch.device("cuda", 0)
    monkeypatch.setattr(timing, "host_excess", lambda summary, host, device: right(summary, host, card))
    output = tmp_path / "results.json"
    assert tool.main(options(name, config, output)) == 0
    found = {rival: numbers["host_excess"] for rival, numbers in rows(output)[0]["rivals"].items()}
    expected = (0.005 - (0.003 if name == "step" else 0.002)) / 0.008
    assert found["resident"] == found["derived"] == found["adapters"] == pytest.approx(expected)
    assert found["dense"] == pytest.approx(-0.1 if name == "step" else 0)
    assert right({"host_seconds": 1.0, "seconds": 1.0}, 0.5, torch.device("cpu")) is None
