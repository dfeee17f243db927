"""A file of choices is written by many, refused if it is something else, and knows what crashed the process before.

Run: pytest tests/sparse/kernels/test_store.py
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest

from slope_dist.errors import UserError
from slope_dist.sparse import kernels

CHOICE = {"label": "expand", "seconds": {"expand": 1.0}, "dense_seconds": 1.0, "rejected": {}}


def choice_text(**changed: object) -> str:
    return json.dumps({"format": 1, "settings": {"a": {"b": CHOICE | changed}}})


def test_a_file_of_choices_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    path.write_text(choice_text())
    assert kernels.ChoiceStore(path).choices("a").keys() == {"b"}


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", '{"format": 2, "settings": {}}', '{"format": 1, "settings": {"a": {"b": 3}}}', "[" * 10000),
        '{"format": 1, "settings": {"a": {"b": {"label": "expand"}}}}',
        *(choice_text(seconds={}), choice_text(seconds={"expand": "1"}), choice_text(dense_seconds=None)),
        json.dumps({"format": 1, "settings": {}, "crashed": {"a": {"b": {"c": 1}}}}),
        json.dumps({"format": 1, "settings": {}, "findings": {"a": {"b": True}}}),
        *(choice_text(dense_seconds=float("nan")), choice_text(rejected=[]), choice_text(rejected={"other": 1})),
    ],
)
def test_a_file_of_something_else_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    path.write_text(text)
    with pytest.raises(UserError, match="no file of kernel choices"):
        kernels.ChoiceStore(path)
    assert path.read_text() == text


def test_what_many_write_at_once_is_all_there(tmp_path: Path) -> None:
    stores = [kernels.ChoiceStore(tmp_path / "kernels.json") for _ in range(4)]

    def write(number: int) -> None:
        stores[number % 4].add("a", {f"{number}": CHOICE})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(60)))
    assert stores[0].choices("a").keys() == {f"{number}" for number in range(60)}


def test_a_file_system_without_locks_is_written_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> NoReturn:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refused)
    store = kernels.ChoiceStore(tmp_path / "kernels.json")
    store.add("a", {"b": CHOICE})
    with store.trying("a", "b", "way"):
        # Whether its process lives nobody can say, unless there is no other.
        assert kernels.ChoiceStore(store.path).crashed("a") == {}
        assert kernels.ChoiceStore(store.path, alone=True).crashed("a").keys() == {"b"}
    assert store.choices("a").keys() == {"b"}


def crash(path: Path) -> None:
    """Leave a mark as a process does that a candidate kills."""
    child = os.fork()
    if not child:
        try:
            with kernels.ChoiceStore(path).trying("a", "b", "way"):
                os._exit(9)
        finally:
            os._exit(1)
    os.waitpid(child, 0)


def test_what_killed_its_process_is_known_at_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    crash(path)
    assert len(list(tmp_path.glob("*.trying.*"))) == 1
    for _ in range(2):
        (reason,) = kernels.ChoiceStore(path).crashed("a")["b"].values()
        assert reason.startswith(f"crashed or hung when it was tried, on {socket.gethostname()} at 20")
    assert list(tmp_path.glob("*.trying.*")) == [] and kernels.ChoiceStore(path).crashed("c") == {}


def test_what_is_being_tried_has_not_crashed(tmp_path: Path) -> None:
    store = kernels.ChoiceStore(tmp_path / "kernels.json")
    with store.trying("a", "b", "way"):
        assert kernels.ChoiceStore(store.path).crashed("a") == {}
    with pytest.raises(KeyboardInterrupt), store.trying("a", "b", "way"):
        raise KeyboardInterrupt
    assert kernels.ChoiceStore(store.path, alone=True).crashed("a") == {}
    assert list(tmp_path.glob("*trying*")) == []


@pytest.mark.parametrize("alone", [False, True])
def test_marks_of_another_machine_are_judged_by_who_is_alone(
    alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kernels.json"
    crash(path)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    assert bool(kernels.ChoiceStore(path, alone=alone).crashed("a")) is alone


def test_a_mark_that_was_cut_short_goes(tmp_path: Path) -> None:
    mark = tmp_path / "kernels.json.trying.1"
    mark.write_text('{"setting": "a"')
    assert kernels.ChoiceStore(tmp_path / "kernels.json", alone=True).crashed("a") == {}
    assert not mark.exists()


def test_a_mark_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    store = kernels.ChoiceStore(tmp_path / "folder" / "kernels.json", hint="try another")
    (tmp_path / "folder").write_text("")
    with pytest.raises(UserError, match=r"cannot be written: .*; try another$"), store.trying("a", "b", "way"):
        pass
