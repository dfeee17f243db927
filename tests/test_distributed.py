"""Ranks find the packages that the tests find: also those that PYTHONPATH alone names, as on a lent machine.

Run: pytest tests/test_distributed.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import Server


def test_packages_on_pythonpath_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brought_along.py").write_text("def told():\n    return 7\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    server = Server()
    request = {"module": "brought_along", "name": "told", "arguments": [], "timeout": 60.0}
    try:
        codes = server.ask(request | {"world_size": 1, "process_group": False, "folder": str(tmp_path)})
    finally:
        server.close()
    assert codes == [0], (tmp_path / "0.err").read_text()
    assert (tmp_path / "0.json").read_text() == "7"
