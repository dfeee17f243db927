"""Claim: after any sequence of saves, kills, damage, restarts and clean-ups the newest k checkpoints that verify are
there, and the milestones, the rest of the writer's folders are gone, and nothing else was touched. The model is a
dictionary of what must be on disk. A manifest is read once, and again when it has changed.

Run alone: python -m pytest tests/checkpoint/test_retention.py
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from slope_dist.checkpoint import Checkpoint, Retention, find_newest, format
from slope_dist.checkpoint.format import folder_name

from .states import in_child, kill_at, save_state

FOREIGN = ["notes.txt", "step-1", "step-00000001-bak", "old-step-00000002", ".trash-mine", "step-00000003.tmp-mine"]


class Killed(BaseException):
    """Ends a save where kill -9 would: no handler of the writer sees it, nothing is cleaned up."""


def stop_at(point: str):
    def progress(reached: str) -> None:
        if reached == point:
            raise Killed

    return progress


def prune(folder: Path, keep: int, **keywords: Any) -> list[str]:
    """Of a process that has written nothing itself."""
    return Retention(folder, keep).prune(**keywords)


class Model(RuleBasedStateMachine):
    """`whole` are the steps that verify, `cut` and `flipped` those that do not: only the former are shorter."""

    @initialize(keep=st.integers(2, 5), every=st.sampled_from([None, 2, 3]))
    def start(self, keep: int, every: int | None) -> None:
        self.keep = keep
        self.every = every
        self.folder = Path(tempfile.mkdtemp())
        self.whole: set[int] = set()
        self.cut: set[int] = set()
        self.flipped: set[int] = set()
        self.next_step = 1
        self.pruned = True
        for name in FOREIGN:
            (self.folder / name).mkdir()
            (self.folder / name / "manifest.json").write_text("mine")

    @property
    def dispensable(self) -> list[int]:
        """Steps that need not stay, the oldest first."""
        newest = sorted(self.whole)[-self.keep :]
        if len(newest) < self.keep:
            return []
        older = (step for step in self.whole | self.flipped if step < newest[0])
        return sorted(step for step in older if self.every is None or step % self.every)

    @rule(stride=st.integers(1, 3))
    def save_and_prune(self, stride: int) -> None:
        step = self.next_step
        # A process that was started just now: it knows of what it has written itself, and must find out the rest.
        retention = Retention(self.folder, self.keep, self.every)
        saved = save_state(self.folder, step)
        retention.trust(saved.path, saved.sizes)
        self.next_step += stride
        self.whole.add(step)
        gone = set(self.dispensable)
        assert retention.prune() == []
        self.whole -= gone
        self.flipped -= gone
        assert self.whole, "at least one verifies"
        self.pruned = True

    @rule(point=st.sampled_from(["weights", "optimizer", "voted", "manifest", "folder", "renamed"]))
    def save_killed(self, point: str) -> None:
        step = self.next_step
        with pytest.raises(Killed):
            save_state(self.folder, step, stop_at(point))
        if point == "renamed":
            self.whole.add(step)
            self.next_step += 1
        self.pruned = False

    @precondition(lambda self: self.dispensable)
    @rule(point=st.sampled_from(["trashed", "removed"]))
    def prune_killed(self, point: str) -> None:
        first = {self.dispensable[0]}
        with pytest.raises(Killed):
            Retention(self.folder, self.keep, self.every).prune(progress=stop_at(point))
        self.whole -= first
        self.flipped -= first
        self.pruned = False

    @precondition(lambda self: len(self.whole) > 1)
    @rule(data=st.data(), flip=st.booleans())
    def damage(self, data: st.DataObject, flip: bool) -> None:
        step = data.draw(st.sampled_from(sorted(self.whole)))
        folder = self.folder / folder_name(step)
        names = sorted(name for name in os.listdir(folder) if not flip or name.startswith("rank"))
        victim = folder / data.draw(st.sampled_from(names))
        if flip:
            content = bytearray(victim.read_bytes())
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
            victim.write_bytes(content)
        else:
            os.truncate(victim, victim.stat().st_size - 1)
        self.whole.remove(step)
        (self.flipped if flip else self.cut).add(step)
        self.pruned = self.pruned and not self.dispensable

    @invariant()
    def the_newest_whole_one_is_found(self) -> None:
        if not hasattr(self, "folder"):
            return
        found = find_newest(self.folder)
        checkpoint, skipped = found.checkpoint, found.skipped
        assert (checkpoint.step if checkpoint else None) == max(self.whole, default=None)
        newer = [step for step in self.cut | self.flipped if step > max(self.whole, default=0)]
        for step in newer:
            assert any(folder_name(step) in line for line in skipped)

    @invariant()
    def the_folder_holds_what_it_should(self) -> None:
        if not hasattr(self, "folder"):
            return
        names = set(os.listdir(self.folder)) - {"latest"}
        for name in FOREIGN:
            assert (self.folder / name / "manifest.json").read_text() == "mine"
        expected = {folder_name(step) for step in self.whole | self.cut | self.flipped} | set(FOREIGN)
        assert names >= expected
        if self.pruned:
            assert names == expected

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


def test_retention_follows_the_model() -> None:
    run_state_machine_as_test(
        Model,
        settings=settings(
            max_examples=25, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


class Readings:
    """Counts the manifests that are decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        validate = format.Manifest.model_validate

        def counted(content: Any) -> Any:
            # Of one without pieces the rest is checked before it is written.
            self.count += any(tensor["fragments"] for tensor in content["tensors"].values())
            return validate(content)

        monkeypatch.setattr(format.Manifest, "model_validate", counted)

    def since(self) -> int:
        """How many since the last call."""
        count, self.count = self.count, 0
        return count


def test_a_save_decodes_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        save_state(tmp_path, step)
    readings = Readings(monkeypatch)
    retention = Retention(tmp_path, 2)
    # The newest is what a run has resumed.
    resumed = Checkpoint.open(tmp_path / folder_name(3))
    retention.trust(resumed.path, resumed.sizes)
    counts = [readings.since()]
    for step in (4, 5, 6, 7):
        saved = save_state(tmp_path, step)
        retention.trust(saved.path, saved.sizes)
        assert retention.prune() == []
        counts.append(readings.since())
    assert counts == [1, 2, 0, 0, 0], "the resumed one; those older than that, once, before they are removed; no others"
    assert sorted(os.listdir(tmp_path)) == ["latest", folder_name(6), folder_name(7)]


@pytest.mark.parametrize("damage", ["manifest", "cut", "gone", "foreign"])
def test_what_is_known_is_still_looked_at(damage: str, tmp_path: Path) -> None:
    retention = Retention(tmp_path, 2)
    for step in (1, 2, 3):
        saved = save_state(tmp_path, step)
        retention.trust(saved.path, saved.sizes)
    folder = tmp_path / folder_name(2)
    victim = sorted(folder.glob("rank*"))[0]
    if damage == "manifest":
        content = (folder / "manifest.json").read_bytes()
        (folder / "manifest.json").write_bytes(content.replace(b'"step":2', b'"step":3'))
    elif damage == "cut":
        os.truncate(victim, victim.stat().st_size - 1)
    elif damage == "gone":
        victim.unlink()
    else:
        (folder / "notes.txt").write_text("mine")
    assert retention.prune() == []
    assert sorted(os.listdir(tmp_path)) == ["latest", *(folder_name(step) for step in (1, 2, 3))], "two whole ones"


def test_at_least_two_stay(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        prune(tmp_path, 1)


def test_a_checkpoint_with_a_foreign_file_is_neither_counted_nor_touched(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_state(tmp_path, step)
    (tmp_path / folder_name(1) / "notes.txt").write_text("mine")
    (tmp_path / folder_name(4) / "notes.txt").write_text("mine")
    before = sorted(os.listdir(tmp_path / folder_name(1)))
    assert prune(tmp_path, 2) == []
    assert sorted(os.listdir(tmp_path)) == ["latest", *(folder_name(step) for step in (1, 2, 3, 4))]
    assert sorted(os.listdir(tmp_path / folder_name(1))) == before


def test_damaged_checkpoints_are_not_counted(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_state(tmp_path, step)
    for step in (3, 4):
        (tmp_path / folder_name(step) / "manifest.json").write_text("{}")
    assert prune(tmp_path, 2) == []
    assert sorted(os.listdir(tmp_path)) == ["latest", *(folder_name(step) for step in (1, 2, 3, 4))]


def test_links_are_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    precious = save_state(elsewhere, 1).path
    checkpoints = tmp_path / "checkpoints"
    for step in (2, 3):
        save_state(checkpoints, step)
    (checkpoints / folder_name(1)).symlink_to(precious)
    (checkpoints / f".trash-{folder_name(1)}-{'0' * 32}").symlink_to(precious)
    (checkpoints / f"{folder_name(1)}.tmp-{'0' * 32}").symlink_to(precious)
    assert len(prune(checkpoints, 2)) == 2, "the links with a leftover's name are told"
    checkpoint = find_newest(elsewhere).checkpoint
    assert checkpoint is not None and checkpoint.step == 1
    assert (checkpoints / folder_name(1)).is_symlink()


@pytest.mark.parametrize("point", ["trashed", "removed"])
def test_killed_while_pruning(tmp_path: Path, point: str) -> None:
    for step in (1, 2, 3, 4):
        save_state(tmp_path, step)
    assert in_child(lambda: prune(tmp_path, 2, progress=kill_at(point))) == -9
    assert not (tmp_path / folder_name(1)).exists(), "the oldest went first, and by its name first"
    assert len(list(tmp_path.glob(".trash-*/*"))) == (3 if point == "trashed" else 0)
    checkpoint = find_newest(tmp_path).checkpoint
    assert checkpoint is not None and checkpoint.step == 4
    assert prune(tmp_path, 2) == []
    assert sorted(os.listdir(tmp_path)) == ["latest", folder_name(3), folder_name(4)]
