"""`tools/benchmark.py layer` measures what it is asked for, writes every number, and refuses bad options in one line.

Run: pytest tests/benchmark/test_benchmark_tool.py
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def benchmark(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/benchmark.py", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_a_small_run_reports_every_rival_and_the_machine(tmp_path: Path) -> None:
    file = tmp_path / "layer.json"
    sizes = ("--widths", "64", "--projections", "32", "--tokens", "40", "--dtypes", "bf16")
    done = benchmark("layer", *sizes, "--threads", "1", "--seconds", "0", "--output", str(file))
    assert done.returncode == 0, done.stderr
    for text in ("64 -> 64", "32 -> 128", "128 -> 32", "bf16", "40 tokens", "1 threads", str(file)):
        assert text in done.stdout.replace("\n", "")
    report = json.loads(file.read_text())
    assert {"device", "threads", "torch", "commit", "python"} <= report["machine"].keys()
    assert len(report["rows"]) == 3
    for row in report["rows"]:
        assert set(row["rivals"]) == {"dense", "derived", "resident"}
        assert {"seconds", "ratio", "peak_bytes", "held_bytes", "weight_gradient_error"} <= row["rivals"][
            "derived"
        ].keys()


def test_earlier_results_outlive_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import benchmark as tool

    file = tmp_path / "layer.json"
    table = tool.Table()
    tool._report("layer", [{"seconds": 1.0}], {}, table, file)
    before = file.read_text()

    def cut_short(path: Path, text: str) -> None:
        path.write_bytes(text[:10].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", cut_short)
    with pytest.raises(tool.UserError, match="cannot be written: No space left on device"):
        tool._report("layer", [{"seconds": 2.0}], {}, table, file)
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["layer", "--widths", "100"], "--widths 100 is not a positive multiple of 8"),
        (["layer", "--projections", "0"], "--projections 0 is not a positive multiple of 8"),
        (["layer", "--tokens", "0"], "--tokens 0 is less than 1"),
        (["layer", "--threads", "-1"], "--threads -1 is less than 1"),
        (["layer", "--seconds", "nan"], "--seconds nan is not a time"),
        (["layer", "--dtypes", "fp8"], "invalid choice: 'fp8'"),
        (["layer", "--width", "64"], "unrecognized arguments"),
        (["layer", "--output", "no/such/folder/x.json"], "there is no folder no/such/folder"),
        (["checkpoint", "--layers", "0"], "--layers 0 is less than 1"),
        (["checkpoint", "--folder", "no/such"], "--folder no/such is not a folder"),
        (["checkpoint", "--folder", "long" * 100], "is not a folder that can be written to"),
        (["gemm", "--plot", "long" * 100 + "/x.png"], "there is no folder longlong"),
        (["checkpoint", "--stages", "2"], "invalid choice: 2"),
        (["loader", "--samples", "10"], "--samples 10 is less than 200"),
        (["loader", "--folder", "no/such"], "--folder no/such is not a folder"),
        (["data", "--workers", "0"], "--workers 0 is less than 1"),
        (["data", "--megabytes", "nan"], "--megabytes nan is not between 2 and 10000"),
        (["data", "--tokenizers", "bert"], "invalid choice: 'bert'"),
        (["inference"], "the following arguments are required: --config"),
        (["inference", "--config", "no/such.json"], "no/such.json"),
        (["inference", "--config", "configs/tiny.json", "--prompt", "0"], "--prompt 0 is not between 1 and"),
        (["inference", "--config", "configs/tiny.json", "--folder", "no/such"], "--folder no/such is not a folder"),
        (["speed"], "invalid choice: 'speed'"),
        ([], "COMMAND"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_refused_in_one_line(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.chdir(ROOT)
    import benchmark as tool

    assert tool.main(options) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and message in printed.err and printed.err.count("\n") == 1
