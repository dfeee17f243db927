"""A run of compiled blocks is the run of plain ones, dense and 2:4, in every engine and layout that may compile.

Losses, gradient norms, weights, masks and step counters over ten steps and the adapter switch, by the real trainer;
checkpoints have the same names. Layouts go by torch's tracing and differentiation without code generation, which takes
half a minute a run; one slow test generates it.

Run: pytest tests/engine/test_compilation.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from slope_dist.config import load_config
from slope_dist.engine import compilation
from slope_dist.errors import UserError
from slope_dist.parallel.environment import discover
from slope_dist.training.build import check_engine
from slope_dist.training.trainer import Trainer
from tests.runs import SECTIONS, newest, read_all, write_config
from tests.same_run import assert_same_run, maker_of_runs


def plain_run(config: str) -> None:
    Trainer(load_config(config), discover()).run()


def traced_run(config: str) -> int:
    """Train with blocks as graphs; returns how many blocks were compiled."""
    compilation.BACKEND = "aot_eager"
    return generated_run(config)


def generated_run(config: str) -> int:
    made = 0
    compiled = compilation.BlockCompiler.__call__

    def counted(self: compilation.BlockCompiler, block: Any) -> None:
        nonlocal made
        made += 1
        compiled(self, block)

    compilation.BlockCompiler.__call__ = counted
    Trainer(load_config(config), discover()).run()
    return made


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, list[Any]]]:
    return maker_of_runs(plain_run, corpus, tmp_path_factory)


@pytest.fixture(scope="module")
def traced(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, list[Any]]]:
    return maker_of_runs(traced_run, corpus, tmp_path_factory, training__compile=True)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ZeRO 0": (1, {"parallel__zero_stage": 0}),
    "dense": (1, {"parallel__zero_stage": 0, "sparsity__pattern": "dense"}),
    "ZeRO 1": (2, {"parallel__zero_stage": 1}),
    "ZeRO 2": (2, {"parallel__zero_stage": 2}),
    "FSDP2": (2, {"parallel__engine": "fsdp"}),
    "tensor": (2, {"parallel__tensor": 2}),
    "sequence": (2, {"parallel__tensor": 2, "parallel__sequence_parallel": True}),
    "pipeline": (2, {"parallel__pipeline": 2, "parallel__zero_stage": 1}),
    "recomputed": (1, {"parallel__zero_stage": 0, "training__recompute": "blocks"}),
}


SLOW = LAYOUTS.keys() - {"ZeRO 0", "dense"}


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in LAYOUTS]
)
def test_every_layout(layout: str, expected: Callable, traced: Callable) -> None:
    ranks, changes = LAYOUTS[layout]
    alone = {"parallel__zero_stage": 0} | {k: v for k, v in changes.items() if not k.startswith("parallel")}
    plain, _ = expected(1, **alone)
    found, made = traced(ranks, **changes)
    assert_same_run(found, plain)
    names, others = (sorted(read_all(newest(run), "master")) for run in (found, plain))
    assert names == others
    blocks = SECTIONS["model"]["num_layers"] // changes.get("parallel__pipeline", 1)
    # Where adapters join, those of a second engine.
    assert made == [blocks * (1 if layout == "dense" else 2)] * ranks


@pytest.mark.slow
def test_generated_code(expected: Callable, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    plain, _ = expected(1, parallel__zero_stage=0)
    make = maker_of_runs(generated_run, corpus, tmp_path_factory, training__compile=True)
    found, _ = make(1, parallel__zero_stage=0)
    assert_same_run(found, plain)


@pytest.fixture
def older_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile before 2.13, which takes no limits; the setting that it has instead is put back."""
    newer = torch.compile

    def older(forward: Callable, *, fullgraph: bool, dynamic: bool, backend: Callable) -> Callable:
        return newer(forward, fullgraph=fullgraph, dynamic=dynamic, backend=backend)

    monkeypatch.setattr(torch, "compile", older)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("older_torch")
@pytest.mark.parametrize("thread", ["main", "other"])
def test_blocks_of_many_sizes_are_compiled_by_an_older_torch_too(monkeypatch: pytest.MonkeyPatch, thread: str) -> None:
    """In every thread, since torch keeps a setting for each and recomputes in one of autograd's."""
    sizes = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        sizes.append(inputs[0].shape[-1])
        return graph.forward

    monkeypatch.setattr(compilation, "BACKEND", backend)
    compiler = compilation.BlockCompiler()

    def run() -> None:
        for width in range(1, 13):
            block = torch.nn.Linear(width, width)
            compiler(block)
            block(torch.randn(2, width))

    if thread == "main":
        run()
    else:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(run).result()
    assert len(sizes) == 12


def test_a_machine_without_a_compiler_is_told(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    compilation.check_compiler()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = load_config(write_config(tmp_path, corpus, training__compile=True))
    with pytest.raises(UserError, match=r"training.compile true needs a compiler.* no no-such-compiler in PATH"):
        check_engine(config)
