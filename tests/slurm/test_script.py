"""Claim: the job script is sound shell, names all its variables at its head, and says what it wants where it is no job.

Run: pytest tests/slurm/test_script.py
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

from tests.distributed import ROOT
from tests.slurm.conftest import SCRIPT

TEXT = (ROOT / SCRIPT).read_text()


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_its_head_lists_each_variable() -> None:
    head, body = TEXT.split("\n#SBATCH", 1)
    read = set(re.findall(r"\$\{((?:SLOPE|MASTER)_[A-Z_]+):-", body))
    assert read == set(re.findall(r"^#   ((?:SLOPE|MASTER)_[A-Z_]+) ", head, re.MULTILINE))


def test_outside_a_job_it_says_how_it_is_used() -> None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(["bash", SCRIPT], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: this is a job script; submit it: sbatch ") and done.stderr.count("\n") == 1
