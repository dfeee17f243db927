"""What the tests of this room share: a small state in every dtype, ways to cut it, and real processes to lose."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from slope_dist.checkpoint import Checkpoint, save
from slope_dist.checkpoint.writer import Progress, Saved
from slope_dist.parallel.collectives import rank, world_size
from slope_dist.parallel.fragments import Fragment, Kind, Rectangle, rectangle_size, whole

State = dict[tuple[str, Kind], Tensor]


def make_state(step: int) -> State:
    """A few tensors in every dtype a checkpoint holds, different at every step."""
    generator = torch.Generator().manual_seed(step)
    values = torch.randn(8, 6, generator=generator)
    return {
        ("layers.0.fc1.weight.values", "weight"): values.bfloat16(),
        ("layers.0.fc1.weight.indices", "metadata"): torch.randint(
            0, 256, (8, 2), dtype=torch.uint8, generator=generator
        ),
        ("layers.0.fc1.weight.values", "master"): values,
        ("layers.0.fc1.weight.values", "exp_avg"): torch.randn(8, 6, generator=generator),
        ("layers.0.fc1.weight.values", "exp_avg_sq"): torch.randn(8, 6, generator=generator).double(),
        ("norm.bias", "weight"): torch.randn(5, generator=generator).half(),
        ("scale", "weight"): torch.randn((), generator=generator),
    }


def fragments_of(state: State) -> Iterator[Fragment]:
    """This rank's pieces: weights cut along the last dimension, optimizer state in flat ranges, scalars replicated."""
    me, ranks = rank(), world_size()
    for (name, kind), tensor in state.items():
        shape = tuple(tensor.shape)
        if kind in ("weight", "metadata") and shape:
            low, high = shape[-1] * me // ranks, shape[-1] * (me + 1) // ranks
            rectangle = (*whole(shape[:-1]), (low, high))
            piece = tensor[..., low:high].contiguous()
            yield Fragment(name, kind, shape, rectangle, 0, piece.numel(), piece)
        elif shape:
            low, high = tensor.numel() * me // ranks, tensor.numel() * (me + 1) // ranks
            yield Fragment(name, kind, shape, whole(shape), low, high, tensor.view(-1)[low:high])
        else:
            yield Fragment(name, kind, shape, (), 0, 1, tensor, write=me == 0)


def save_state(checkpoints: Path, step: int, progress: Progress | None = None) -> Saved:
    """Save `make_state(step)` as all ranks together."""
    return save(checkpoints, step, fragments_of(make_state(step)), {"step": step}, {"seed": 1}, {}, progress=progress)


def assert_holds(checkpoint: Checkpoint, state: State) -> None:
    """Every tensor of the state is read back whole and equal, bit for bit."""
    assert set(checkpoint.manifest.tensors) == {f"{kind}/{name}" for name, kind in state}
    for (name, kind), tensor in state.items():
        found = checkpoint.read(name, kind, whole(tuple(tensor.shape)), 0, tensor.numel())
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor.reshape(-1))


def part_of(tensor: Tensor, rectangle: Rectangle, start: int, stop: int) -> Tensor:
    """What a read must return, by plain indexing."""
    part = tensor[tuple(slice(low, high) for low, high in rectangle)]
    assert part.numel() == rectangle_size(rectangle)
    return part.reshape(-1)[start:stop]


def kill_at(point: str, victim: int = 0) -> Progress:
    """A progress callback with which rank `victim` dies by kill -9 at a named point."""

    def progress(reached: str) -> None:
        if reached == point and rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


def start(function: Callable[[int], object], num_children: int = 1) -> list[int]:
    """Run `function(index)` in forked processes; returns their ids."""
    pids = []
    for index in range(num_children):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                function(index)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        pids.append(pid)
    return pids


def wait(pids: list[int]) -> list[int]:
    """The exit status of each process: 0, 1 after an exception (which it printed), -9 when killed."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def in_child(function: Callable[[], object]) -> int:
    """Run `function` in a forked process, which Ctrl-C interrupts, and wait for it; returns its exit status."""

    def interruptible(_: int) -> None:
        # Where tests are run in the background of a shell, it is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        function()

    return wait(start(interruptible))[0]


def start_ranks(function: Callable[[], object], num_ranks: int, scratch: Path) -> list[int]:
    """Run `function` as the ranks of a gloo group, in forked processes; returns their ids."""
    store = scratch / "store"
    with suppress(FileNotFoundError):
        store.unlink()

    def body(index: int) -> None:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=index,
            world_size=num_ranks,
            timeout=timedelta(seconds=30),
        )
        function()

    return start(body, num_ranks)


def in_ranks(function: Callable[[], object], num_ranks: int, scratch: Path) -> list[int]:
    """Run `function` as the ranks of a gloo group and wait for them; returns their exit statuses."""
    return wait(start_ranks(function, num_ranks, scratch))
