"""Claim: what a program's output meets, and what its user can mend, is at most one line, and an exit code.

Run: pytest tests/test_command_line.py
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from slope_dist.command_line import Parser, path_argument
from slope_dist.errors import UserError
from tests.programs import output_to, run_python

PROGRAM = """
import sys
from slope_dist.command_line import answer
from slope_dist.errors import UserError

def work():
    {work}

sys.exit(answer(work))
"""


def run(work: str, output: int) -> tuple[int, str]:
    """Exit code and stderr of a program, its stdout buffered as that of a pipe is."""
    done = run_python("-c", PROGRAM.format(work=work), stdout=output)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        ("print(1)", (0, "")),
        ("raise UserError('a\\nb')", (2, "error: a\\nb\n")),
        ("raise KeyboardInterrupt", (130, "interrupted\n")),
    ],
)
def test_an_end_is_a_line_and_a_code(work: str, expected: tuple[int, str]) -> None:
    assert run(work.replace("\n", "\\n"), subprocess.DEVNULL) == expected


@pytest.mark.parametrize("text", ["'a'", "'a' * 10**6"])
def test_a_reader_that_has_left_is_no_error(text: str) -> None:
    with output_to("nobody") as output:
        assert run(f"print({text})", output) == (0, "")


@pytest.mark.parametrize("text", ["'a'", "'a' * 10**6"])
def test_an_output_without_room_is_one_line(text: str) -> None:
    with output_to("a full device") as output:
        code, errors = run(f"print({text})", output)
    assert (code, errors) == (2, "error: standard output cannot be written: No space left on device\n")


def test_another_failure_stays_one() -> None:
    code, errors = run("open('/nowhere/at/all')", subprocess.DEVNULL)
    assert code == 1
    assert "FileNotFoundError" in errors


@pytest.mark.parametrize(
    ("arguments", "named"), [(["run", "--output", ""], "--output"), (["", "--output", "out"], "FOLDER")]
)
def test_a_path_is_not_the_working_folder_because_a_variable_is_not_set(arguments: list[str], named: str) -> None:
    parser = Parser()
    parser.add_argument("--output", type=path_argument)
    parser.add_argument("folder", type=path_argument, metavar="FOLDER")
    assert parser.parse_args(["run", "--output", "out"]).folder == Path("run")
    with pytest.raises(UserError, match=f"argument {named}: is empty; give a path"):
        parser.parse_args(arguments)
