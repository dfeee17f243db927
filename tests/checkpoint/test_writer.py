"""Claim: what ranks save together is read back bit for bit, by this package and by safetensors itself; a save that
fails says so in one line on every rank, and one that is killed at any named point leaves the previous checkpoint or
the new one, whole, with no manual step before the next. Ranks are real processes in a gloo group, kills are kill -9.

Not tested: power cuts (what was written but not synced is never lost here).

Run alone: python -m pytest tests/checkpoint/test_writer.py
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slope_dist.checkpoint import Checkpoint, CheckpointError, Retention, find_newest, reader, save, writer
from slope_dist.checkpoint.writer import UnsavableError
from slope_dist.parallel.collectives import rank
from slope_dist.parallel.fragments import Fragment, whole

from .states import assert_holds, fragments_of, in_child, in_ranks, kill_at, make_state, save_state, start_ranks, wait

POINTS = ["weights", "optimizer", "voted", "manifest", "folder", "renamed", "latest"]


def whole_fragment(name: str, tensor: torch.Tensor, /, **changes: Any) -> Fragment:
    shape = tuple(tensor.shape)
    given = {"rectangle": whole(shape), "start": 0, "stop": tensor.numel(), "tensor": tensor, **changes}
    return Fragment(name, "weight", shape, **given)


def test_one_rank_round_trip(tmp_path: Path) -> None:
    seen: list[str] = []
    folder = save_state(tmp_path, 3, seen.append).path
    assert folder == tmp_path / "step-00000003"
    assert seen == POINTS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003"]
    assert (tmp_path / "latest").read_text() == "step-00000003\n"
    found = find_newest(tmp_path)
    checkpoint, skipped = found.checkpoint, found.skipped
    assert checkpoint is not None and skipped == []
    assert (checkpoint.step, checkpoint.scalars, checkpoint.identity) == (3, {"step": 3}, {"seed": 1})
    assert checkpoint.manifest.versions.keys() == {"slope_dist", "torch", "python"}
    assert_holds(checkpoint, make_state(3))


@pytest.mark.parametrize("chunk_bytes", [8, 24, 2**20])
def test_the_files_are_plain_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    """Read without our reader, as docs/checkpoint-format.md says a stranger may; written in chunks of several sizes."""
    monkeypatch.setattr(writer, "CHUNK_BYTES", chunk_bytes)
    folder = save_state(tmp_path, 3).path
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for (name, kind), tensor in make_state(3).items():
        (fragment,) = manifest["tensors"][f"{kind}/{name}"]["fragments"]
        assert torch.equal(load_file(folder / fragment["file"])[fragment["key"]], tensor.reshape(-1))


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    """Odd sizes of narrow dtypes come first here, and would shift the wide ones where memory-mapping cannot read."""
    dtypes = [torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8]
    fragments = [whole_fragment(f"a{index}", torch.ones(3, dtype=dtype)) for index, dtype in enumerate(dtypes)]
    data = (save(tmp_path, 1, fragments, {}, {}, {}).path / "rank-00000.weights.safetensors").read_bytes()
    header_size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_size])
    for index, dtype in enumerate(dtypes):
        assert (8 + header_size + header[f"weight/a{index}/0"]["data_offsets"][0]) % dtype.itemsize == 0


def test_a_save_needs_little_host_memory(tmp_path: Path) -> None:
    """128 MiB of state, of which a small part may be copied at a time: 16 MiB, and what the interpreter takes."""

    def body() -> None:
        fragment = whole_fragment("a", torch.ones(2**25))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        save(tmp_path, 1, [fragment], {}, {}, {})
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 * 1024

    assert in_child(body) == 0


def test_views_and_many_fragments_of_a_tensor(tmp_path: Path) -> None:
    tensor = torch.randn(6, 8, requires_grad=True)
    fragments = [
        whole_fragment("a", tensor, rectangle=((0, 6), (0, 3)), stop=10, tensor=tensor[:, :3].reshape(-1)[:10]),
        whole_fragment("a", tensor, rectangle=((0, 6), (0, 3)), start=10, stop=10, tensor=tensor.view(-1)[:0]),
        whole_fragment(
            "a", tensor, rectangle=((0, 6), (0, 3)), start=10, stop=18, tensor=tensor[:, :3].reshape(-1)[10:]
        ),
        whole_fragment("a", tensor, rectangle=((0, 6), (3, 8)), stop=30, tensor=tensor[:, 3:]),
        whole_fragment("a", torch.full((6, 8), 7.0), write=False),
        whole_fragment("b", tensor[:, 1]),
        whole_fragment("c", tensor.bfloat16()[:, 1]),
    ]
    save(tmp_path, 1, fragments, {}, {}, {})
    checkpoint = find_newest(tmp_path).checkpoint
    assert checkpoint is not None
    assert torch.equal(checkpoint.read("a", "weight", whole((6, 8)), 0, 48), tensor.detach().view(-1))
    assert torch.equal(checkpoint.read("b", "weight", whole((6,)), 0, 6), tensor[:, 1])
    assert torch.equal(checkpoint.read("c", "weight", whole((6,)), 0, 6), tensor[:, 1].bfloat16())
    assert [path.name for path in checkpoint.path.glob("rank*")] == ["rank-00000.weights.safetensors"]


def test_two_ranks_save_in_parallel(tmp_path: Path) -> None:
    assert in_ranks(lambda: save_state(tmp_path / "checkpoints", 5), 2, tmp_path) == [0, 0]
    found = find_newest(tmp_path / "checkpoints")
    checkpoint, skipped = found.checkpoint, found.skipped
    assert checkpoint is not None and skipped == []
    assert sorted(checkpoint.manifest.files) == [
        f"rank-0000{index}.{sort}.safetensors" for index in (0, 1) for sort in ("optimizer", "weights")
    ]
    assert_holds(checkpoint, make_state(5))


A = torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize(
    ("fragments", "message"),
    [
        ([whole_fragment("a", A, stop=11, tensor=A.view(-1)[:11])], "weight/a: elements .* missing"),
        ([whole_fragment("a", A), whole_fragment("a", A)], "weight/a: elements .* held twice"),
        ([whole_fragment("a", A, stop=11)], "weight a: elements .* 12 given"),
        ([whole_fragment("a", A), whole_fragment("a", A.half())], "weight/a: one fragment says dtype F32, another F16"),
        ([whole_fragment("a", A), whole_fragment("a", A.view(12))], "weight/a: one fragment says shape"),
        ([whole_fragment("a/b", A)], "pattern"),
        ([whole_fragment("a", A.to(torch.complex64))], r"torch\.complex64"),
        ([], "tensors"),
    ],
)
def test_a_defect_does_not_become_a_checkpoint(tmp_path: Path, fragments: list[Fragment], message: str) -> None:
    save_state(tmp_path, 1)
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, 2, fragments, {}, {}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


def test_a_manifest_that_no_reader_would_take_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path, 1)
    size = (tmp_path / "step-00000001" / "manifest.json").stat().st_size
    for module in (writer, reader):
        monkeypatch.setattr(module, "MAX_MANIFEST_BYTES", size)
    assert_holds(Checkpoint.open(save_state(tmp_path, 2).path), make_state(2))
    for module in (writer, reader):
        monkeypatch.setattr(module, "MAX_MANIFEST_BYTES", size - 1)
    with pytest.raises(UnsavableError, match=r"manifest of 7 pieces would take .*; let fewer ranks share each tensor"):
        save_state(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001", "step-00000002"]


def test_scalars_that_are_not_json_fail_the_save(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="step 2 was not saved: TypeError"):
        save(tmp_path, 2, [whole_fragment("a", A)], {"x": A}, {}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_on_one_rank_is_an_error_on_all(tmp_path: Path, failing: int) -> None:
    checkpoints = tmp_path / "checkpoints"

    def fragments() -> Iterator[Fragment]:
        yield from fragments_of(make_state(2))
        if rank() == failing:
            raise OSError(5, "Input/output error", "the device")

    def body() -> None:
        save_state(checkpoints, 1)
        with pytest.raises(CheckpointError, match=f"step 2 was not saved: rank {failing}: the device: Input/output"):
            save(checkpoints, 2, fragments(), {}, {}, {})
        save_state(checkpoints, 3)

    assert in_ranks(body, 2, tmp_path) == [0, 0]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-00000001", "step-00000003"]


def test_overlap_between_ranks_is_found(tmp_path: Path) -> None:
    def body() -> None:
        with pytest.raises(CheckpointError, match=r"weight/a: elements .* held twice"):
            save(tmp_path / "checkpoints", 2, [whole_fragment("a", A)], {}, {}, {})

    assert in_ranks(body, 2, tmp_path) == [0, 0]
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("limit", [100, 3000])
def test_a_file_that_cannot_grow_fails_the_save_alone(tmp_path: Path, limit: int) -> None:
    """A size limit stands for a full disk: it is met in the first tensor file, or only in the manifest."""
    save_state(tmp_path, 1)
    assert max(path.stat().st_size for path in (tmp_path / "step-00000001").glob("rank*")) < 3000

    def body() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        file = "manifest.json" if limit == 3000 else "rank-00000.weights.safetensors"
        with pytest.raises(CheckpointError, match=rf"step 2 was not saved: .*{file}: File too large$") as caught:
            save(tmp_path, 2, fragments_of(make_state(2)), {"padding": "x" * 3000}, {}, {})
        assert str(caught.value).isprintable()

    assert in_child(body) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    found = find_newest(tmp_path)
    checkpoint, skipped = found.checkpoint, found.skipped
    assert checkpoint is not None and skipped == []
    assert_holds(checkpoint, make_state(1))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Not a directory"):
        save_state(tmp_path / "file" / "checkpoints", 1)


def expect_after_kill(checkpoints: Path, point: str) -> None:
    """The newest checkpoint that verifies is the one the point says, and the next save needs no help."""
    found = find_newest(checkpoints)
    checkpoint, skipped = found.checkpoint, found.skipped
    committed = POINTS.index(point) >= POINTS.index("renamed")
    assert checkpoint is not None
    assert checkpoint.step == (2 if committed else 1)
    assert_holds(checkpoint, make_state(checkpoint.step))
    assert len(skipped) == (0 if committed else 1)
    save_state(checkpoints, 3)
    assert Retention(checkpoints, 2).prune() == []
    kept = ["step-00000002" if committed else "step-00000001", "step-00000003"]
    assert sorted(path.name for path in checkpoints.iterdir() if path.name != "latest.tmp") == ["latest", *kept]


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_every_point(tmp_path: Path, point: str) -> None:
    save_state(tmp_path, 1)
    assert in_child(lambda: save_state(tmp_path, 2, kill_at(point))) == -9
    expect_after_kill(tmp_path, point)


@pytest.mark.parametrize(("victim", "point"), [(0, "manifest"), (0, "renamed"), (1, "weights"), (1, "optimizer")])
def test_one_of_two_ranks_killed(tmp_path: Path, victim: int, point: str) -> None:
    checkpoints = tmp_path / "checkpoints"

    def body() -> None:
        save_state(checkpoints, 1)
        save_state(checkpoints, 2, kill_at(point, victim))

    statuses = in_ranks(body, 2, tmp_path)
    assert statuses[victim] == -9
    assert statuses[1 - victim] == 1, "the survivor does not report a save that its peer did not finish"
    expect_after_kill(checkpoints, point)


def test_a_group_killed_at_random_moments_loses_nothing(tmp_path: Path) -> None:
    """Two ranks save and prune without pause until both are killed; what was reported committed is there, or newer."""
    draw = random.Random(3)
    checkpoints = tmp_path / "checkpoints"
    committed = tmp_path / "committed"
    first_step = 1

    def body() -> None:
        for step in range(first_step, first_step + 1000):
            save_state(checkpoints, step)
            if rank() == 0:
                committed.write_text(str(step))
            Retention(checkpoints, 2).prune()

    for _ in range(12):
        committed.write_text("")
        pids = start_ranks(body, 2, tmp_path)
        while not committed.read_text():
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert wait(pids) == [-9, -9]
        checkpoint = find_newest(checkpoints).checkpoint
        assert checkpoint is not None and checkpoint.step >= int(committed.read_text() or first_step)
        assert_holds(checkpoint, make_state(checkpoint.step))
        first_step = checkpoint.step + 1


def test_a_damaged_folder_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    damaged = save_state(tmp_path, 2).path
    next(damaged.glob("rank*")).write_bytes(b"")
    (damaged / "notes.txt").write_text("mine")
    seen: list[str] = []
    save_state(tmp_path, 2, seen.append)
    assert "replaced" in seen
    checkpoint = find_newest(tmp_path).checkpoint
    assert checkpoint is not None
    assert_holds(checkpoint, make_state(2))
    assert Retention(tmp_path, 2).prune() != [], "what someone else wrote stays, and is told"
    (trash,) = tmp_path.glob(".trash-*")
    assert [path.name for path in trash.iterdir()] == ["notes.txt"]


def test_killed_while_replacing_leaves_the_one_before(tmp_path: Path) -> None:
    save_state(tmp_path, 1)
    next(save_state(tmp_path, 2).path.glob("rank*")).write_bytes(b"")
    assert in_child(lambda: save_state(tmp_path, 2, kill_at("replaced"))) == -9
    checkpoint = find_newest(tmp_path).checkpoint
    assert checkpoint is not None and checkpoint.step == 1
    save_state(tmp_path, 2)
    assert Retention(tmp_path, 2).prune() == []
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001", "step-00000002"]
