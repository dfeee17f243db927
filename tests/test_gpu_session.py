"""tools/gpu_session.sh: what it runs on a machine with a GPU, what comes back, what it refuses; its Python stands in.

Run: pytest tests/test_gpu_session.py
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "gpu_session.sh"
TESTS = ["triton", "cusparselt", "products", "cutlass", "training"]
KERNELS = "gpu-session-kernels.tar.gz"
BENCHMARKS = ["gemm", "block", "step", "decode", "refresh"]

# {failing}: lines of a shell's case, by the stage's test folder or benchmark.
PYTHON = """#!/bin/bash
case "$1 $2 $3" in
  "-c import torch"*capability*) echo sm_90a ;;
  "-c import torch"*) echo "{card}" ;;
  "-c import importlib"*) for name in "${{@:3}}"; do case $name in {missing}) echo "missing $name" ;; esac; done ;;
  "-m slope_dist.sparse.kernels.cutlass.build --arch")
    ls "$XDG_CACHE_HOME" 2>/dev/null
    mkdir -p "$XDG_CACHE_HOME" && echo "compiled for $4" >"$XDG_CACHE_HOME/kernel.so" ;;
  *)
    echo "$@ $PYTHONPATH" >>{calls}
    echo "said $2"
    case "$*" in {failing} esac ;;
esac
"""


@pytest.fixture
def session(tmp_path: Path):
    def run(
        *arguments: str,
        failing: str = "",
        missing: str = "nothing",
        card: str = "NVIDIA H200",
        script: Path = SCRIPT,
        **environment: str,
    ):
        python, calls = tmp_path / "python", tmp_path / "calls"
        python.write_text(PYTHON.format(card=card, missing=missing, failing=failing, calls=calls))
        python.chmod(0o755)
        calls.write_text("")
        command = [str(script), "--results", "results", "--python", str(python), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | environment)
        return done, [line.split() for line in calls.read_text().splitlines()]

    return run


def packed(out: Path) -> dict[str, str]:
    assert {path.name for path in out.iterdir()} - {KERNELS, ".kernels"} == {"gpu-session.tar.gz"}
    with tarfile.open(out / "gpu-session.tar.gz") as archive:
        return {m.name.removeprefix("./"): archive.extractfile(m).read().decode() for m in archive if m.isfile()}  # type: ignore[union-attr]


def test_stages_run_in_order_each_in_a_process_of_its_own_and_come_back_in_one_file(session, tmp_path: Path) -> None:
    done, calls = session("--limit", "2400", "out")
    assert done.returncode == 0, done.stderr
    assert [call[1] for call in calls] == ["pytest"] * 5 + BENCHMARKS
    assert calls[0][:7] == ["-m", "pytest", "-m", "gpu", "-vv", "-rfEs", "-n"]
    results = tmp_path / "results"
    assert calls[5][:4] == ["tools/benchmark.py", "gemm", "--output", f"{results}/gemm-nvidia-h200.json"]
    assert calls[0][6:9] == ["-n", "8", "tests/sparse/kernels/jit"]
    assert calls[1][6] == "tests/sparse/kernels/cusparselt"
    assert not any("-x" in call for call in calls)
    assert packed(tmp_path / "out").keys() == {"cutlass-build.log", *(f"{stage}.1.log" for stage in TESTS + BENCHMARKS)}
    # A later call keeps the logs of the one before.
    done, calls = session("out", "gemm")
    assert [call[1] for call in calls] == ["gemm"] and packed(tmp_path / "out")["gemm.2.log"].startswith("said gemm")


def test_kernels_are_compiled_beside_the_first_stages_and_once_for_all_calls(session, tmp_path: Path) -> None:
    waiting = f"*gemm*) until [ -e {tmp_path / 'out' / KERNELS} ]; do sleep 0.01; done ;;"
    done, _ = session("out", "gemm", failing=waiting)
    assert done.returncode == 0, done.stdout
    assert "kernel.so" not in packed(tmp_path / "out")["cutlass-build.log"]
    # Another machine: what came back is all it has.
    shutil.rmtree(tmp_path / "results")
    (tmp_path / "results").mkdir()
    (tmp_path / "out" / KERNELS).rename(tmp_path / "results" / KERNELS)
    done, _ = session("out", "gemm", failing=waiting)
    assert packed(tmp_path / "out")["cutlass-build.log"] == "kernel.so\n"
    assert (tmp_path / "results" / "cache" / "kernel.so").read_text() == "compiled for sm_90a\n"


def test_every_test_for_a_gpu_is_in_a_stage(session) -> None:
    done, _ = session("--list", "out", "tests")
    named = [ROOT / word for line in done.stdout.splitlines() for word in line.split() if word.startswith("tests/")]
    marked = [
        path
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"pytest\.mark\.gpu|kernels\.devices import", path.read_text())
        and path != Path(__file__).resolve()
    ]
    assert len(marked) > 10
    for path in marked:
        assert any(path == place or place in path.parents for place in named), path


def test_what_failed_is_summed_up_last_and_the_others_run(session, tmp_path: Path) -> None:
    failing = (
        "*kernels/jit*) echo 'FAILED tests/a.py::test_a - off'; echo '1 failed, 3 passed in 2s'; exit 1 ;; "
        "*cusparselt*) echo 'tests/b.py::test_b[7] ok'; echo 'tests/b.py::test_b[8] '; echo Fatal; kill -SEGV $$ ;; "
        "*' block '*) exit 3 ;;"
    )
    done, calls = session("--limit", "2400", "out", failing=failing)
    assert done.returncode == 1 and len(calls) == 10
    lines = done.stdout.splitlines()
    assert lines[-1] == "failed: triton cusparselt block"
    assert "triton: failed with code 1; 1 failed, 3 passed in 2s; triton.1.log" in lines
    assert "cusparselt: failed with code 139; last test: tests/b.py::test_b[8] ; cusparselt.1.log" in lines
    assert "block: failed with code 3; said block; block.1.log" in lines
    assert "gemm: done; said gemm; gemm.1.log" in lines and "FAILED tests/a.py::test_a - off" in lines


def test_a_stage_that_hangs_is_stopped_and_what_it_wrote_comes_back(session, tmp_path: Path) -> None:
    failing = "*' gemm '*) echo half >results/gemm.json; exec sleep 60 ;;".replace("results", str(tmp_path / "results"))
    done, _ = session("--limit", "18", "out", "gemm", failing=failing)
    assert done.returncode == 1 and "gemm: stopped after" in done.stdout, done.stdout
    assert packed(tmp_path / "out")["gemm.json"] == "half\n"


def test_stages_share_the_time_and_one_without_is_not_begun(session, tmp_path: Path) -> None:
    done, calls = session("--list", "--limit", "600", "out", "decode", "gemm", card="")
    assert done.returncode == 0 and calls == [] and not (tmp_path / "out").exists()
    decode, gemm = done.stdout.splitlines()
    # 20 and 35 parts of 600 s, less what a stage may take to end; 20 s are for its start.
    assert decode.startswith("decode, 203 s: ") and decode.endswith("--minutes 3.0 --seconds 1")
    assert gemm.startswith("gemm, 367 s: ") and "--minutes 5.7" in gemm
    done, calls = session("--limit", "20", "out", "decode", "gemm")
    assert done.returncode == 1 and "decode: not run, no time is left" in done.stdout
    assert [call[1] for call in calls] == ["gemm"]


def test_what_lacks_a_package_is_not_run_and_is_said_in_one_line(session) -> None:
    done, calls = session("--limit", "2400", "out", missing="pydantic|deepspeed")
    assert [call[1] for call in calls] == ["pytest"] * 4
    assert done.stderr == (
        "not run: training gemm block step decode refresh; this Python lacks deepspeed pydantic: give wheels of them "
        "with --wheels DIR, made as docs/gpu-session.md says\n"
    )
    assert done.returncode == 1 and done.stdout.splitlines()[-1].startswith("failed: training gemm")
    done, calls = session("out", "gemm", missing="pydantic")
    assert done.returncode == 2 and calls == [] and done.stderr.count("\n") == 1


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """The script in a folder of its own, which is no repository."""
    copied = tmp_path / "copy" / "tools" / "gpu_session.sh"
    copied.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, copied)
    return copied


def test_wheels_are_installed_beside_the_system(session, elsewhere: Path, tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "a-1-py3-none-any.whl").touch()
    done, calls = session("--wheels", "given", "out", "gemm", script=elsewhere, SLOPE_COMMIT="abc")
    assert done.returncode == 0, done.stderr
    site = str(tmp_path / "copy" / "build" / "gpu-site")
    assert calls[0][:3] == ["-m", "pip", "install"] and {"--no-index", "--no-deps"} < set(calls[0])
    assert calls[0][-4:-1] == ["--target", site, str(tmp_path / "given" / "a-1-py3-none-any.whl")]
    assert calls[1][1] == "gemm" and calls[1][-1].startswith(f"{site}:")


def test_another_cusparselt_is_found_before_the_installed_one(session, elsewhere: Path, tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_text("a library")
    done, [call] = session("--cusparselt", "lib.so", "out", "gemm", script=elsewhere, SLOPE_COMMIT="abc")
    assert done.returncode == 0, done.stderr
    folder = call[-1].split(":")[0]
    assert Path(folder, "nvidia/cusparselt/lib/libcusparseLt.so.0").read_text() == "a library"


@pytest.mark.parametrize(("commit", "code"), [("", 2), ("a" * 40, 0)], ids=["unknown", "given"])
def test_outside_a_repository_the_commit_must_be_given(
    commit: str, code: int, session, elsewhere: Path, tmp_path: Path
) -> None:
    done, calls = session("out", "gemm", script=elsewhere, SLOPE_COMMIT=commit, GIT_CEILING_DIRECTORIES=str(tmp_path))
    assert done.returncode == code and len(calls) == (code == 0)
    assert code == 0 or ("SLOPE_COMMIT" in done.stderr and done.stderr.count("\n") == 1)


@pytest.mark.parametrize(
    "arguments",
    [[], ["out", "nope"], ["--limit", "x", "out"], ["--limit"], ["--wrong", "out"], ["--wheels", "no/such", "out"]],
    ids=str,
)
def test_what_it_does_not_know_is_refused(arguments: list[str], session) -> None:
    done, calls = session(*arguments)
    assert done.returncode == 2 and calls == []
    assert done.stdout + done.stderr


def test_without_a_card_nothing_runs(session) -> None:
    done, calls = session("out", card="")
    assert done.returncode == 2 and calls == [] and "no CUDA device" in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shellcheck_finds_nothing() -> None:
    assert subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True).stdout == b""
