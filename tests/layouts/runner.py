"""Runs cases one after another, keeps their results, and leaves out what has already passed."""

from __future__ import annotations

import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.layouts.cases import Case
from tests.layouts.comparison import Run, compare, run_case
from tests.resumable import sources_hash

SOURCES = ("slope_dist", "tests/layouts", "tests/runs.py", "tests/distributed.py", "constraints.txt")
RESULTS = "results.json"
FAILURES = "failures"

_HEADINGS = ("loss", "norm", "weight", "gradient")


class Runner:
    """Runs cases and keeps their results.

    Args:
        folder: where results and the logs of failures are kept; it exists.
        corpus: makes the corpus in the folder it is given, and returns its place.
        sources: hash under which results are valid.
        say: prints a line.
    """

    def __init__(
        self,
        folder: Path,
        corpus: Callable[[Path], Path],
        sources: str | None = None,
        say: Callable[[str], None] = lambda text: print(text, flush=True),
    ) -> None:
        self.folder = folder
        self.corpus = corpus
        self.sources = sources or sources_hash(SOURCES)
        self.say = say
        self.results: dict[str, dict[str, Any]] = self._kept()
        self._controls: dict[Case, Run] = {}

    def run(self, cases: list[Case]) -> bool:
        """Run what has not passed yet; returns whether nothing failed."""
        width = max(len(case.name) for case in cases)
        self.say(f"{'case':{width}}  steps " + " ".join(f"{heading:>8}" for heading in _HEADINGS) + "  seconds")
        with tempfile.TemporaryDirectory(prefix="layouts-") as scratch:
            for case in cases:
                kept = self.results.get(case.name)
                if kept is None or kept["state"] != "pass":
                    self.results[case.name] = self._result(case, Path(scratch))
                    self._keep()
                self.say(self._row(case, width) + (" (kept)" if kept is self.results[case.name] else ""))
        states = [self.results[case.name]["state"] for case in cases]
        self.say(", ".join(f"{states.count(state)} {state}" for state in ("pass", "FAIL", "skipped")))
        return "FAIL" not in states

    def _result(self, case: Case, scratch: Path) -> dict[str, Any]:
        log = self.folder / FAILURES / f"{case.name.replace(' ', '_').replace(':', '')}.txt"
        log.unlink(missing_ok=True)
        start = time.perf_counter()
        result: dict[str, Any] = {"state": "FAIL"}
        try:
            control = self._control(case.control, scratch)
            start = time.perf_counter()
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                deviation = compare(case, run_case(case, Path(folder), self.corpus(scratch)), control)
            result |= asdict(deviation)
            result["state"] = "FAIL" if deviation.problems else "pass"
        except pytest.skip.Exception as reason:
            result |= {"state": "skipped", "problems": [str(reason)]}
        except Exception as error:
            # Whatever it is, the other cases go on; an error of the ranks' has their tracebacks in its text.
            log.parent.mkdir(exist_ok=True)
            log.write_text(f"{case.name}\n{traceback.format_exc()}")
            result["problems"] = [f"did not run: {_last_line(str(error))}; see {log}"]
        return result | {"seconds": round(time.perf_counter() - start, 1)}

    def _control(self, case: Case, scratch: Path) -> Run:
        if case not in self._controls:
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                self._controls[case] = run_case(case, Path(folder), self.corpus(scratch))
        return self._controls[case]

    def _row(self, case: Case, width: int) -> str:
        result = self.results[case.name]
        numbers = [f"{result[name]:8.1e}" if name in result else f"{'-':>8}" for name in _HEADINGS]
        text = f"{case.name:{width}}  {result.get('steps', '-'):>5} {' '.join(numbers)}  {result['seconds']:7.1f}"
        return "\n    ".join([f"{text}  {result['state']}", *result["problems"]])

    def _kept(self) -> dict[str, dict[str, Any]]:
        """What an earlier run of the same sources has left."""
        try:
            stored = json.loads((self.folder / RESULTS).read_text())
            return dict(stored["cases"]) if stored["sources"] == self.sources else {}
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            # Absent, or cut short by something else than this program: nothing is lost but time.
            return {}

    def _keep(self) -> None:
        path = self.folder / RESULTS
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"sources": self.sources, "cases": self.results}, indent=1) + "\n")
        os.replace(part, path)


def _last_line(text: str) -> str:
    """The line of an error that says what it is: the last of the first rank's traceback."""
    first = text.split("\n\n")[0].strip()
    return first.splitlines()[-1] if first else "no reason given"
