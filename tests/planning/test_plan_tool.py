"""`tools/plan.py` says what fits and how long it takes, in words and for programs, ranks layouts, refuses in one line.

Run: pytest tests/planning/test_plan_tool.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import ROOT
from tests.programs import output_to, run_python
from tests.runs import write_config
from tools import plan

SMALL = {"parallel__pipeline": 2, "precision": "bf16"}
TWO = ("--gpu", "a100-40gb", "--gpus-per-node", "2", "--nodes", "1")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = plan.main(list(arguments))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_plan_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_config(tmp_path, tmp_path, **SMALL))
    code, text, _ = run(capsys, "--config", path, *TWO)
    assert code == 0
    for part in ("a rank of stage", "while adapters join", "dense fits", "2:4 fits", "UNVALIDATED", "not modelled:"):
        assert part in text, part
    code, text, _ = run(capsys, "--config", path, *TWO, "--json")
    found = json.loads(text)
    assert code == 0 and found["products"]["measured"] is False
    for form in (found["run"], found["dense"]):
        assert len(form["stages"]) == 2
        for stage in form["stages"]:
            before = stage["before"]
            assert before["state"] + before["buffers"] + before["activations"] == before["bytes"] <= form["bytes"]
        step = form["step"]
        assert sum(value for name, value in step.items() if name != "total") == pytest.approx(step["total"])
        assert form["tokens_per_second"] > 0 and form["days"] > 0 and form["traffic"][0]
    assert found["run"]["bytes"] < found["dense"]["bytes"]
    assert found["run"]["step_with_adapters"] and found["dense"]["step_with_adapters"] is None


def gemm(folder: Path, device: str) -> str:
    rows: list[dict[str, Any]] = [
        {
            "cell": f"{kind} {tokens}",
            "kind": kind,
            "tokens": tokens,
            "rows": 64,
            "columns": 64,
            "dtype": "bfloat16",
            "rivals": {"dense": {"seconds": 1e-3}, "dispatcher": {"seconds": 5e-4}},
        }
        for kind in ("forward", "input gradient")
        for tokens in (128, 1024)
    ]
    path = folder / "gemm.json"
    path.write_text(json.dumps({"benchmark": "gemm", "machine": {"device": device}, "rows": rows}))
    return str(path)


def test_measured_products_are_used_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, file = str(write_config(tmp_path, tmp_path, **SMALL)), gemm(tmp_path, "NVIDIA A100-SXM4-40GB")
    code, text, _ = run(capsys, "--config", path, *TWO, "--gemm", file)
    # Links, attention and the pipeline are not measured by that.
    assert code == 0 and "times: UNVALIDATED; products measured on NVIDIA A100-SXM4-40GB" in text
    assumed, measured = (
        json.loads(run(capsys, "--config", path, *TWO, "--json", *more)[1]) for more in ((), ("--gemm", file))
    )
    assert measured["run"]["step"]["products"] > 10 * assumed["run"]["step"]["products"]
    assert measured["run"]["bytes"] == assumed["run"]["bytes"]


def test_measured_steps_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "cell": "opt125m",
        "config": "opt125m",
        "tokens": 2048,
        "dtype": "bfloat16",
        "rivals": {"dense": {"seconds": 1e9}},
    }
    file = tmp_path / "block.json"
    machine = {"device": "NVIDIA A100-SXM4-80GB"}
    file.write_text(json.dumps({"benchmark": "block", "machine": machine, "rows": [row]}))
    code, text, error = run(capsys, "--gpu", "a100-80gb", "--validate", str(file))
    assert code == plan.EXIT_FAR_OFF and "opt125m" in text and "0 of 1 within 15%" in error


def test_a_plan_is_validated_by_measured_steps_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, file = str(write_config(tmp_path, tmp_path, **SMALL)), tmp_path / "block.json"
    row = {"cell": "opt125m", "config": "opt125m", "tokens": 2048, "dtype": "bfloat16"}
    row["rivals"] = {"dense": {"seconds": 1.0}}
    made = {"benchmark": "block", "machine": {"device": "NVIDIA A100-SXM4-40GB"}, "rows": [row]}
    file.write_text(json.dumps(made))
    _, shown, _ = run(capsys, "--gpu", "a100-40gb", "--validate", str(file), "--json")
    predicted = json.loads(shown)[0]["predicted"]
    for ratio, said in ((1.1, f"all of 1 measured cells in {file} are met within 15%"), (1.2, "UNVALIDATED, 1 of 1")):
        row["rivals"] = {"dense": {"seconds": predicted / ratio}}
        file.write_text(json.dumps(made))
        code, text, _ = run(capsys, "--config", path, *TWO, "--checked-by", str(file))
        assert code == 0 and f"times: {said}" in text


@pytest.mark.parametrize("form", [[], ["--json"]])
@pytest.mark.parametrize(("options", "expected"), [(["--validate"], plan.EXIT_FAR_OFF), (["--config"], 0)])
def test_a_reader_that_has_left_changes_no_exit_code(
    options: list[str], expected: int, form: list[str], tmp_path: Path
) -> None:
    row = {"cell": "opt125m", "config": "opt125m", "tokens": 2048, "dtype": "bfloat16"}
    file = tmp_path / "block.json"
    made = {"machine": {"device": "NVIDIA A100-SXM4-40GB"}, "rows": [row | {"rivals": {"dense": {"seconds": 1e9}}}]}
    file.write_text(json.dumps({"benchmark": "block"} | made))
    path = file if options == ["--validate"] else write_config(tmp_path, tmp_path, **SMALL)
    with output_to("nobody") as output:
        # What is printed fails at once, as it does where it is more than a buffer.
        done = run_python(ROOT / "tools/plan.py", *TWO, *options, path, *form, stdout=output, buffered=False)
    assert done.returncode == expected, done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.parametrize("option", ["--gemm", "--checked-by", "--validate"])
def test_measurements_in_another_precision_are_refused(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, device = str(write_config(tmp_path, tmp_path, **SMALL | {"precision": "fp32"})), "NVIDIA A100-SXM4-40GB"
    file = gemm(tmp_path, device)
    if option != "--gemm":
        row = {"cell": "opt125m", "config": "opt125m", "tokens": 2048, "dtype": "bfloat16"}
        rows = [row | {"rivals": {"dense": {"seconds": 1.0}}}]
        Path(file).write_text(json.dumps({"benchmark": "block", "machine": {"device": device}, "rows": rows}))
    code, _, error = run(capsys, "--config", path, *TWO, option, file)
    assert code == 2 and "nothing that was measured in float32, but in bfloat16" in error and error.count("\n") == 1


def test_layouts_that_fit_come_first_and_fast_ones_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"model__hidden_size": 1024, "model__ffn_size": 4096, "model__num_layers": 160, "model__num_heads": 16}
    # Another layout for fewer GPUs: what would not go with it is searched all the same.
    path = str(write_config(tmp_path, tmp_path, precision="bf16", parallel__alternatives=[{"pipeline": 2}], **sizes))
    changes = ("--set", "training.global_batch_size=4", "--set", "training.micro_batch_size=1")
    code, text, _ = run(capsys, "--config", path, *TWO, "--search", "--json", *changes)
    layouts = json.loads(text)
    assert code == 0
    assert {each["changes"]["training.micro_batch_size"] for each in layouts} == {1}, "what --set says is kept"
    fits = [layout["fits"] for layout in layouts]
    assert fits == sorted(fits, reverse=True) and fits[0]
    assert all(layout["fits"] == (layout["why_not"] == "") for layout in layouts)
    seconds = [layout["seconds"] for layout in layouts if layout["fits"]]
    assert seconds == sorted(seconds)
    engines = {(each["changes"]["parallel.engine"], each["changes"]["parallel.zero_stage"]) for each in layouts}
    assert {("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)} < engines and "fsdp" in dict(engines)
    axes = ("parallel.tensor", "parallel.pipeline", "parallel.data")
    for each in layouts:
        tensor, pipeline, data = (each["changes"][axis] for axis in axes)
        assert tensor * pipeline * data == 2
    code, text, _ = run(capsys, "--config", path, *TWO, "--search", "--top", "2", *changes)
    assert code == 0 and "the first of them: --set parallel.engine=" in text


@pytest.mark.parametrize(("size", "stage", "run_as"), [(12, 2, 2), (4, 0, 1)])
def test_what_is_set_is_searched_around_whatever_it_is(
    size: int, stage: int, run_as: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_config(tmp_path, tmp_path, precision="bf16", training__global_batch_size=24))
    held = {"training.micro_batch_size": size, "parallel.zero_stage": stage, "parallel.tensor": 1}
    changes = [part for name, value in held.items() for part in ("--set", f"{name}={value}")]
    code, text, error = run(capsys, "--config", path, *TWO, "--search", "--json", *changes)
    assert code == 0, error
    layouts = [layout["changes"] for layout in json.loads(text)]
    assert {layout["training.micro_batch_size"] for layout in layouts} == {size}
    assert {layout["parallel.zero_stage"] for layout in layouts} == {run_as}
    assert {layout["parallel.engine"] for layout in layouts} == {"deepspeed", "fsdp"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--gpu", "h900", "--nodes", "1"), "--gpu h900: unknown; it can be a100-40gb"),
        (("--gpu", "a100-40gb", "--nodes", "0"), "--nodes 0: must be more than 0"),
        (
            ("--gpu", "a100-40gb", "--nodes", "1", "--gpus-per-node", "3"),
            "does not divide --nodes x --gpus-per-node 3; make it ",
        ),
        (("--gpu", "a100-40gb", "--nodes", "1", "--between-gb", "1e-320"), "--between-gb 9.99989e-321: must be from"),
        (("--gpu", "a100-40gb", "--nodes", "1", "--inside-gb", "inf"), "--inside-gb inf: must be from 0.001 to"),
        (("--gpu", "a100-40gb", "--nodes", "1", "--search", "--top", "0"), "--top 0: must be at least 1"),
        ((), "--gpu is required where the config has no parallel.gpu"),
        (("--gpu", "a100-40gb"), "--nodes is required where the config has no parallel.gpus"),
        (("--gpu", "a100-40gb", "--nodes", "1", "--gemm", "/none"), "/none cannot be read"),
        (("--gpu", "a100-40gb", "--nodes", "1", "--search", "--validate", "x"), "not allowed with argument"),
        (("--gpu", "a100-40gb", "--validate", "/none"), "/none cannot be read"),
        (("--gpu", "a100-40gb", "--nodes", "1", "--checked-by", "/none"), "/none cannot be read"),
    ],
)
def test_bad_input_is_one_line(
    options: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_config(tmp_path, tmp_path, parallel__tensor=2))
    code, out, error = run(capsys, "--config", path, *options)
    assert code == 2 and not out
    assert said in error and error.count("\n") == 1 and error.startswith("error: ")
