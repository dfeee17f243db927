"""`tools/plan.py` says what fits, in words and for machines, ranks layouts, and refuses bad input in one line.

Run: pytest tests/planning/test_plan_tool.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runs import write_config
from tools import plan

ROOT = Path(__file__).resolve().parents[2]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = plan.main(list(arguments))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_plan_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_config(tmp_path, tmp_path, parallel__pipeline=2, precision="bf16"))
    options = ("--config", path, "--gpu", "a100-40gb", "--gpus-per-node", "2")
    code, text, _ = run(capsys, *options)
    assert code == 0
    for part in ("stage 2 of 2", "2:4, while they join", "dense: fits", "2:4: fits", "predicted, not measured"):
        assert part in text
    code, text, _ = run(capsys, *options, "--json")
    found = json.loads(text)
    assert code == 0 and found["measured"] is False
    for name in ("sparse", "dense"):
        for stage in found[name]["stages"]:
            assert sum(stage["before"]["parts"].values()) == stage["before"]["bytes"]
            assert stage["before"]["bytes"] <= found[name]["most"]


@pytest.mark.slow
def test_layouts_that_fit_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"model__hidden_size": 2048, "model__ffn_size": 8192, "model__num_layers": 40, "model__num_heads": 16}
    path = str(write_config(tmp_path, tmp_path, precision="bf16", **sizes))
    changes = ("--set", "training.global_batch_size=2", "--set", "training.micro_batch_size=1")
    code, text, _ = run(
        capsys, "--config", path, "--gpu", "a100-40gb", "--gpus-per-node", "2", "--search", "--json", *changes
    )
    layouts = json.loads(text)["layouts"]
    assert code == 0
    fits = [layout["fits"] for layout in layouts]
    assert fits == sorted(fits, reverse=True) and fits[0]
    assert all(layout["fits"] == (layout["why_not"] is None) for layout in layouts)
    engines = {(each["changes"]["parallel.engine"], each["changes"]["parallel.zero_stage"]) for each in layouts}
    assert {("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)} < engines
    products = {
        each["changes"]["parallel.tensor"] * each["changes"]["parallel.pipeline"] * each["changes"]["parallel.data"]
        for each in layouts
    }
    assert products == {2}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--gpu", "h900"), "invalid choice: 'h900'"),
        (("--gpu", "a100-40gb", "--nodes", "0"), "0 is not a whole number above 0"),
        (("--gpu", "a100-40gb", "--gpus-per-node", "3"), "does not divide the 3 ranks"),
        ((), "--gpu is needed"),
    ],
)
def test_bad_input_is_one_line(
    options: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_config(tmp_path, tmp_path, parallel__tensor=2))
    code, out, error = run(capsys, "--config", path, *options)
    assert code == 2 and not out
    assert said in error and error.count("\n") == 1
