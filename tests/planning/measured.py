"""A real engine on real ranks, its memory counted: what predictions are held against.

Twice at once: the storages of all tensors as operations make and free them, and the resident memory of the process as
the system sees it.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from slope_dist.benchmark.memory import return_free_heap
from slope_dist.config import Config, Derived, derive, load_config
from slope_dist.parallel.environment import discover
from slope_dist.parallel.fragments import MemorySource
from slope_dist.parallel.groups import Groups
from slope_dist.parallel.groups import start as start_groups
from slope_dist.parallel.layout import Layout
from slope_dist.planning.storages import StorageCounter
from tests.runs import allow_fp16

_MMAP_THRESHOLD = -3
"""Of mallopt(3)."""

STEPS = 2
"""Of each phase; the second finds what the first has left."""


class Resident:
    """Resident memory of this process, above what it was at the beginning."""

    def __init__(self) -> None:
        # Each tensor on pages of its own, which go back when it is freed. As it is by default, the C library keeps what
        # is freed below a limit that grows to 32 MB, and how much depends on the order of all that came before.
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**20)
        gc.collect()
        return_free_heap()
        self.baseline = self._status("VmRSS")
        self.restart()

    def restart(self) -> None:
        """Begin a new peak."""
        Path("/proc/self/clear_refs").write_text("5")

    @property
    def peak(self) -> int:
        """The most since then."""
        return self._status("VmHWM") - self.baseline

    @staticmethod
    def _status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


class EngineCounter(StorageCounter):
    """Sees also what FSDP does: it frees and makes memory by resizing, which is no operation."""

    def __enter__(self) -> EngineCounter:
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = self._resize(storage, size)
            self.look(storage)
            return result

        torch.UntypedStorage.resize_ = resize
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)


def micro_batches(config: Config, derived: Derived, generator: torch.Generator) -> Iterator[tuple[Any, Any]]:
    """Random tokens of one step."""
    shape = (config.training.micro_batch_size, config.model.sequence_length + 1)
    for _ in range(derived.accumulation_steps):
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
        yield tokens[:, :-1], tokens[:, 1:]


def begin(path: str) -> tuple[Config, Derived, Groups, torch.Generator]:
    """The run of a config on this rank: its derived values, its groups, and what its samples are drawn with."""
    config = load_config(path)
    if config.precision == "fp16" and not torch.cuda.is_available():
        allow_fp16()
    derived = derive(config, discover().world_size)
    parallel = config.parallel
    groups = start_groups(Layout(parallel.tensor, derived.data_ranks, parallel.pipeline))
    return config, derived, groups, torch.Generator().manual_seed(groups.position.data)


def measure(path: str) -> dict[str, int]:
    """Bytes of this rank by moment.

    Of each phase: what stays ("rest"), the most of a step ("peak"), the most of it until the optimizer is called
    ("passes"), and the most resident ("resident"). Between them: the most while the adapters join ("switch").
    """
    from slope_dist.training.build import build_engine

    config, derived, groups, generator = begin(path)
    warm_up()
    resident = Resident()
    found: dict[str, int] = {}
    counter = EngineCounter()

    def train(engine: Any, phase: str) -> None:
        passes: list[int] = []
        update = engine._adam.step

        def step(*arguments: Any, **options: Any) -> Any:
            passes.append(counter.peak)
            return update(*arguments, **options)

        engine._adam.step = step
        resident.restart()
        peaks = []
        for number in range(1, STEPS + 1):
            counter.restart()
            passes.clear()
            batches = list(micro_batches(config, derived, generator))
            engine.begin_step(number)
            assert engine.train_step(batches).skipped is None
            peaks.append((counter.peak, passes[0]))
        del batches, engine._adam.step
        gc.collect()
        found[f"{phase} peak"] = max(peak for peak, _ in peaks)
        found[f"{phase} passes"] = max(peak for _, peak in peaks)
        found[f"{phase} rest"] = counter.bytes
        found[f"{phase} resident"] = resident.peak

    with counter:
        engine: Any = build_engine(config, derived, groups, adapters=False)
        found["build"] = counter.peak
        engine.set_learning_rates({"base": 1e-4})
        train(engine, "before")
        if derived.adapter_steps:
            counter.restart()
            resident.restart()
            source = MemorySource.take(*engine.export_state())
            engine.close()
            del engine
            engine = build_engine(config, derived, groups, adapters=True, draw=False)
            engine.load_state(source, new_adapters=True)
            del source
            found["switch"] = counter.peak
            found["switch resident"] = resident.peak
            engine.set_learning_rates({"base": 1e-4, "adapters": 1e-4})
            train(engine, "after")
    return found


def switch_with_copies(path: str) -> dict[str, int]:
    """Bytes of this rank at the switch as they are on a GPU: the state that waits is a copy, and not counted.

    What the old engine has left ("left") when it is closed, and the most until the new one is loaded ("switch").
    """
    from slope_dist.training.build import build_engine

    config, derived, groups, generator = begin(path)
    counter = EngineCounter()
    with counter:
        engine: Any = build_engine(config, derived, groups, adapters=False)
        engine.set_learning_rates({"base": 1e-4})
        engine.begin_step(1)
        engine.train_step(list(micro_batches(config, derived, generator)))
        source = MemorySource.take(*engine.export_state())
        for pieces in source.pieces.values():
            pieces[:] = [replace(piece, tensor=piece.tensor.clone()) for piece in pieces]
        copies = sum(piece.tensor.nbytes for pieces in source.pieces.values() for piece in pieces)
        del pieces
        engine.close()
        del engine
        left = counter.bytes
        counter.restart()
        engine = build_engine(config, derived, groups, adapters=True, draw=False)
        engine.load_state(source, new_adapters=True)
    return {"left": left - copies, "switch": counter.peak - copies}


def peaks_on_gpu(path: str) -> dict[str, int]:
    """The most bytes that the allocator of this rank's GPU gives out in two steps of each phase, and at the switch."""
    from slope_dist.training.build import build_engine
    from slope_dist.training.products import start_products

    config, derived, groups, generator = begin(path)
    # As a run does before its first step.
    start_products(config, derived, Path(path).parent)
    found: dict[str, int] = {}

    def train(engine: Any, phase: str) -> None:
        torch.cuda.reset_peak_memory_stats()
        for step in range(1, STEPS + 1):
            engine.begin_step(step)
            engine.train_step(list(micro_batches(config, derived, generator)))
        found[phase] = torch.cuda.max_memory_allocated()

    engine: Any = build_engine(config, derived, groups, adapters=False)
    engine.set_learning_rates({"base": 1e-4})
    train(engine, "before")
    if derived.adapter_steps:
        torch.cuda.reset_peak_memory_stats()
        source = MemorySource.take(*engine.export_state())
        engine.close()
        del engine
        engine = build_engine(config, derived, groups, adapters=True, draw=False)
        engine.load_state(source, new_adapters=True)
        del source
        found["switch"] = torch.cuda.max_memory_allocated()
        engine.set_learning_rates({"base": 1e-4, "adapters": 1e-4})
        train(engine, "after")
    engine.close()
    return found


def warm_up() -> None:
    """Compute a little: the libraries' code is read from disk when it is first used."""
    layer = torch.nn.Linear(256, 256)
    adam = torch.optim.AdamW(layer.parameters())
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(16, 256, dtype=dtype)
        torch.nn.functional.linear(x, layer.weight.to(dtype)).float().square().mean().backward()
        adam.step()
