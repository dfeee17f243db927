"""Claim: every command in README.md works as it is printed.

The commands run verbatim in a folder that links to the repository's launch/ and tools/, where configs/tiny.json is the
shipped one with smaller sizes. `make pretrain` and `make test` are checked to run what the README says; `make pretrain`
itself runs, in a fresh clone, under the marker slow.

    pytest tests/test_readme.py
    pytest tests/test_readme.py -m slow
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slope_dist.training.folder import read_rows

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
COMMANDS = [line for block in BLOCKS for line in block.strip().splitlines()]
RUNNABLE = [command for command in COMMANDS if not command.startswith("make ")]
SMALL = {
    "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_size": 64, "sequence_length": 32},
    "training": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "warmup_steps": 1},
    "evaluation": {"interval": 0, "samples": 4},
    "checkpoint": {"interval": 0},
    "run": {"threads": 1},
    # Of which one command evaluates all.
    "data": {"valid_fraction": 0.005},
}


def environment() -> dict[str, str]:
    """This interpreter's programs first, the repository importable, no launcher variables."""
    env = {name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
    folder = str(Path(sys.executable).parent)
    return env | {"PATH": f"{folder}:{env['PATH']}", "PYTHONPATH": str(ROOT)}


def run(command: str, folder: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a shell command as a reader of the README would."""
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: shipped programs and configs, a smaller tiny.json, some text."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").mkdir()
    for name in ("launch", "tools"):
        (folder / name).symlink_to(ROOT / name)
    for config in (ROOT / "configs").glob("*.json"):
        (folder / "configs" / config.name).symlink_to(config)
    tiny = json.loads((ROOT / "configs/tiny.json").read_text())
    for section, values in SMALL.items():
        tiny.setdefault(section, {}).update(values)
    (folder / "configs/tiny.json").unlink()
    (folder / "configs/tiny.json").write_text(json.dumps(tiny))
    texts = folder / "my_texts"
    texts.mkdir()
    library = Path(os.__file__).parent
    for source in sorted(library.glob("*.py"))[:60]:
        (texts / f"{source.stem}.txt").write_bytes(source.read_bytes())
    rows = [json.dumps({"text": f"Row {number} of a small file. " * 5}) for number in range(40)]
    (folder / "my_rows.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def test_readme_has_commands() -> None:
    assert {"make pretrain", "make test"} <= set(COMMANDS)
    assert len(RUNNABLE) >= 8


def test_commands_in_order(place: Path) -> None:
    """In the README's own order, for some build on others; every launcher's run starts from nothing."""
    losses: dict[str, list[float]] = {}
    for command in RUNNABLE:
        launches_tiny = "configs/tiny.json" in command and "run.folder" not in command
        tiny = place / "runs/tiny"
        if launches_tiny and tiny.exists():
            tiny.rename(place / "runs" / f"tiny-{len(losses)}")
        result = run(command, place)
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
        if launches_tiny:
            losses[command] = [row["loss"] for row in read_rows(tiny / "metrics.jsonl") if "loss" in row]
            for name in ("config.json", "loss.png", "checkpoints/step-00000004/manifest.json"):
                assert (tiny / name).exists(), f"{command} left no {name}"
            assert list(tiny.glob("events.out.tfevents.*"))
    assert len(losses) == 4
    first = next(iter(losses.values()))
    for command, values in losses.items():
        assert values == pytest.approx(first, rel=1e-5), command
    again = run("python launch/pretrain.py --config configs/tiny.json", place)
    assert again.returncode == 0 and "this run is finished" in again.stdout


@pytest.mark.parametrize("target", ["pretrain", "test", "check"])
def test_make_targets_run_what_the_readme_says(target: str) -> None:
    shown = run(f"make -n {target}", ROOT)
    assert shown.returncode == 0, shown.stderr
    expected = {
        "pretrain": "deepspeed launch/pretrain.py --config configs/tiny.json",
        "test": "pytest",
        "check": "mypy",
    }[target]
    assert expected in shown.stdout


@pytest.mark.slow
def test_make_pretrain_in_a_fresh_clone(tmp_path: Path) -> None:
    """From a clean clone to a perplexity: installs, prepares, trains, switches, saves, draws."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    result = run("env -u PYTHONPATH make pretrain", clone, timeout=1800)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    rows = read_rows(clone / "runs/tiny/metrics.jsonl")
    assert {"sparse", "adapters"} == {row["phase"] for row in rows if "phase" in row}
    evaluations = [row for row in rows if "eval_loss" in row]
    assert evaluations[-1]["perplexity"] < evaluations[0]["perplexity"]
    assert (clone / "runs/tiny/loss.png").stat().st_size > 10_000
