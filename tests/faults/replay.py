"""A power cut after each step of a save: what the disk then holds loads as the old checkpoint or the new one.

All that a save does to its folder is logged. A trial takes the first n of these steps, and of what was not made durable
yet keeps all, nothing, or a part drawn at random: bytes written since a file's last fsync, and names made, changed or
removed in a folder since its last fsync.
"""

from __future__ import annotations

import io
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slope_dist.checkpoint import Retention, find_newest, retention, save, tensor_file, writer
from tests.checkpoint.states import assert_holds, fragments_of, make_state

OLD, NEW = 2, 3
STATES = ("all of it", "none of it", "a part of it")


@dataclass(frozen=True)
class Act:
    """One thing that a save does: to `path` (relative), with `data` or another path."""

    what: str
    path: str
    data: bytes = b""
    to: str = ""


class Log:
    """The acts of a save in `root`, as its modules do them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.acts: list[Act] = []
        self._files: dict[int, str] = {}

    def record(self, act: Callable[[], object]) -> list[Act]:
        """Do it, with the modules' own hands watched."""
        real_open, real_os, real_mkdir = open, os, Path.mkdir
        log = self

        class WatchedOS:
            """`os`, of which the calls that change a disk are written down."""

            def __getattr__(self, name: str) -> Any:
                return getattr(real_os, name)

            def fsync(self, descriptor: int) -> None:
                real_os.fsync(descriptor)
                log.acts.append(Act("sync", log.name(real_os.readlink(f"/proc/self/fd/{descriptor}"))))

            def rename(self, source: Path, target: Path) -> None:
                real_os.rename(source, target)
                log.acts.append(Act("rename", log.name(source), to=log.name(target)))

            def unlink(self, path: Path) -> None:
                real_os.unlink(path)
                log.acts.append(Act("unlink", log.name(path)))

            def rmdir(self, path: Path) -> None:
                real_os.rmdir(path)
                log.acts.append(Act("rmdir", log.name(path)))

        class WatchedFile(io.FileIO):
            def write(self, data: Any) -> int:
                log.acts.append(Act("write", log.name(self.name), bytes(data)))
                return super().write(data)

        def watched_open(path: Path, mode: str = "r", **named: Any) -> Any:
            if mode != "xb":
                return real_open(path, mode, **named)
            log.acts.append(Act("create", log.name(path)))
            return WatchedFile(path, "xb")

        def watched_mkdir(path: Path, *given: Any, **named: Any) -> None:
            there = path.exists()
            real_mkdir(path, *given, **named)
            if not there:
                log.acts.append(Act("mkdir", log.name(path)))

        modules: list[Any] = [writer, retention, tensor_file]
        try:
            for module in modules:
                module.os = WatchedOS()
            tensor_file.open = watched_open  # type: ignore[attr-defined]
            Path.mkdir = watched_mkdir  # type: ignore[method-assign]
            act()
        finally:
            for module in modules:
                module.os = real_os
            del tensor_file.open  # type: ignore[attr-defined]
            Path.mkdir = real_mkdir  # type: ignore[method-assign]
        return self.acts

    def name(self, path: object) -> str:
        """Relative to the root; "." for the root itself, ".." for what lies outside."""
        found = Path(str(path))
        return str(found.relative_to(self.root)) if found.is_relative_to(self.root) else ".."


class PowerCut:
    """Trial n cuts after act n // 3; its states of what was not durable take turns."""

    def __init__(self, shared: Path) -> None:
        self.base = shared / "replay" / "base"
        shutil.rmtree(self.base.parent, ignore_errors=True)
        scratch = shared / "replay" / "scratch"
        for step in (OLD - 1, OLD):
            _save(scratch, step)
        shutil.copytree(scratch, self.base)

        log = Log(scratch)
        self.returned = 0

        def save_and_prune() -> None:
            _save(scratch, NEW)
            self.returned = len(log.acts)
            Retention(scratch, 2).prune()

        self.acts = log.record(save_and_prune)
        assert find_newest(scratch).checkpoint is not None

    @property
    def trials(self) -> int:
        """Of every cut in every state."""
        return len(STATES) * (len(self.acts) + 1)

    def __call__(self, index: int, draw: random.Random, room: Path) -> str | None:
        """One cut."""
        cut, state = divmod(index % self.trials, len(STATES))
        root = room / "checkpoints"
        shutil.copytree(self.base, root)
        keep = {"all of it": 1.0, "none of it": 0.0}.get(STATES[state], draw.random())
        _replay(self.acts[:cut], root, lambda: draw.random() < keep)
        last = f"{self.acts[cut - 1].what} {self.acts[cut - 1].path}" if cut else "the beginning"
        found = find_newest(root).checkpoint
        if found is None or found.step not in (OLD, NEW):
            return f"cut after {last}, {STATES[state]}: found {found and found.path.name}"
        if cut >= self.returned and found.step != NEW:
            return f"cut after {last}, {STATES[state]}: the save had returned, and step {found.step} is found"
        try:
            assert_holds(found, make_state(found.step))
        except AssertionError as error:
            return f"cut after {last}, {STATES[state]}: {error}"
        # And the next save is none the worse for it.
        _save(root, NEW + 1)
        Retention(root, 2).prune()
        after = find_newest(root)
        assert after.checkpoint is not None
        return None if after.checkpoint.step == NEW + 1 and not after.leftovers else f"afterwards: {after.skipped}"


def _save(root: Path, step: int) -> None:
    save(root, step, fragments_of(make_state(step)), {"step": step}, {}, {})


def _replay(acts: list[Act], root: Path, lucky: Callable[[], bool]) -> None:
    """Do the acts in `root`, as far as a disk has come with them when the power goes.

    A file's bytes are safe after its own sync, a change of names in a folder after that folder's. What is not safe is
    there if it is `lucky`; file systems keep the order of changes to one folder, so after the first that is lost so are
    the later ones.
    """
    inodes: dict[str, tuple[bytearray, int]] = {}
    changes: list[tuple[str, Act]] = []
    synced: dict[str, int] = {}
    for act in acts:
        if act.what == "create":
            inodes[act.path] = (bytearray(), 0)
            changes.append((str(Path(act.path).parent), act))
        elif act.what == "write":
            inodes[act.path][0].extend(act.data)
        elif act.what == "sync":
            if act.path in inodes:
                content, _ = inodes[act.path]
                inodes[act.path] = (content, len(content))
            synced[act.path] = len(changes)
        elif act.what == "rename":
            changes.append((str(Path(act.path).parent), act))
            for name in [name for name in inodes if name == act.path or name.startswith(f"{act.path}/")]:
                inodes[act.to + name[len(act.path) :]] = inodes.pop(name)
            for name in [name for name in synced if name == act.path]:
                synced[act.to] = synced[name]
        else:
            changes.append((str(Path(act.path).parent), act))
    lost: set[str] = set()
    for number, (folder, act) in enumerate(changes):
        safe = number < _synced_up_to(folder, changes, synced)
        if not safe and (folder in lost or not lucky()):
            lost.add(folder)
            continue
        path = root / act.path
        if not path.parent.is_dir():
            continue
        if act.what == "mkdir":
            path.mkdir(exist_ok=True)
        elif act.what == "create":
            content, durable = _content(act.path, changes, inodes)
            path.write_bytes(content[: len(content) if lucky() else max(durable, 0)])
        elif act.what == "rename" and path.exists():
            os.rename(path, root / act.to)
        elif act.what == "unlink":
            path.unlink(missing_ok=True)
        elif act.what == "rmdir" and path.is_dir():
            # Names in it that a lucky disk still has would make this fail, as they would there.
            shutil.rmtree(path)


def _content(path: str, changes: list[tuple[str, Act]], inodes: dict[str, tuple[bytearray, int]]) -> tuple[bytes, int]:
    """Bytes of a file that was created as `path`, wherever it is now, and how many of them are safe."""
    name = path
    for _, act in changes:
        if act.what == "rename" and (name == act.path or name.startswith(f"{act.path}/")):
            name = act.to + name[len(act.path) :]
    content, durable = inodes.get(name, (bytearray(), 0))
    return bytes(content), durable


def _synced_up_to(folder: str, changes: list[tuple[str, Act]], synced: dict[str, int]) -> int:
    """Number of changes before the last sync of a folder, under any name it has had."""
    names, best = {folder}, 0
    for _, act in changes:
        if act.what == "rename" and act.path in names:
            names.add(act.to)
    for name in names:
        best = max(best, synced.get(name, 0))
    return best
