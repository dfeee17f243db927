"""Small runs for the tests of the engine, the training loop and the entry point: corpus, config, and eyes inside."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slope_dist.checkpoint import Checkpoint, find_newest
from slope_dist.config import Config, load_config
from slope_dist.parallel.environment import Environment, discover
from slope_dist.parallel.fragments import whole
from tests.distributed import run_ranks

VOCAB_SIZE = 512
STEPS = 10
FIRST_ADAPTER_STEP = 6

# Clipping is active in every step, and a step takes two or more micro-batches on each of two ranks. Adam's epsilon is
# a hundredth of a typical gradient: with one of 1e-8, elements whose gradients are rounding alone (in the adapters'
# second factors, as in key biases) would move by the whole learning rate in a direction that is not the run's.
SECTIONS: dict[str, Any] = {
    "run": {"threads": 1, "seed": 7},
    "model": {
        "family": "opt",
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "ffn_size": 64,
        "vocab_size": VOCAB_SIZE,
        "sequence_length": 16,
    },
    # On a GPU each start may find other kernels the fastest, and so another rounding than the run it is compared with.
    "sparsity": {"kernels": "reference"},
    "adapters": {"fraction": 0.5, "rank": 8},
    "training": {
        "steps": STEPS,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "learning_rate": 0.002,
        "min_learning_rate": 0.0005,
        "warmup_steps": 2,
        "gradient_clipping": 0.5,
        "epsilon": 1e-5,
    },
    "evaluation": {"interval": 0, "samples": 6},
    "precision": "fp32",
    "parallel": {"zero_stage": 1, "zero3_persistence_threshold": 0},
    "checkpoint": {"interval": 0},
}
FP16: dict[str, Any] = {"precision": "fp16", "loss_scale__initial_power": 3, "loss_scale__window": 1000}


def small_corpus(base: Path) -> Path:
    """The corpus of all small runs, in `base`; made at the first call."""
    folder = base / "small-corpus"
    if not folder.exists():
        run_ranks(make_corpus, 1, str(folder))
    return folder


def make_corpus(folder: str, seed: int = 3, tokenizer: str | None = None) -> None:
    """Prepare a corpus of words that nobody would write."""
    from slope_dist.data.prepare import prepare
    from slope_dist.data.readers import Document
    from slope_dist.data.sources import Source

    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randrange(2, 9))) for _ in range(400)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    texts = [
        "\n".join(" ".join(draw.choices(words, weights, k=12)) for _ in range(draw.randrange(3, 12))) for _ in range(60)
    ]

    def documents() -> Iterator[tuple[Document, int]]:
        for number, text in enumerate(texts):
            yield Document(name=f"document {number}", text=text), len(text.encode())

    source = Source(description={"kind": "test"}, num_bytes=sum(len(t.encode()) for t in texts), documents=documents)
    prepare(source, folder, vocab_size=VOCAB_SIZE, valid_fraction=0.15, seed=1, tokenizer=tokenizer)


def write_config(folder: Path, corpus: Path, **changes: Any) -> Path:
    """`SECTIONS` with `changes` ("section__key"=value, or "precision"=...), written to `folder`/config.json.

    The run writes to `folder`/run.
    """
    sections = json.loads(json.dumps(SECTIONS))
    sections["run"]["folder"] = str(folder / "run")
    sections["data"] = {"folder": str(corpus)}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            sections.setdefault(section, {})[key] = value
        else:
            sections[section] = value
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(sections))
    return path


def train(config: str | Config, environment: Environment | None = None, accept_steps: bool = False) -> None:
    """Run the real trainer from the newest checkpoint, or the first step, to the last step."""
    from slope_dist.training.folder import Resume
    from slope_dist.training.trainer import Trainer

    loaded = load_config(config) if isinstance(config, str) else config
    Trainer(loaded, environment or discover(), Resume(accept_steps=accept_steps)).run()


def pretrain(*arguments: str) -> int:
    """The entry point's exit code; for ranks forked without a process group."""
    # Beside the package, not in it: found from the repository's root, where ranks run.
    from launch.pretrain import main

    return main(list(arguments))


Watcher = Callable[[str, Any, Any], None]


def watch_engines(watcher: Watcher) -> None:
    """Let the trainer of this (forked) process build engines that report to `watcher`(event, engine, detail).

    Events: "built" and "loaded" (detail None), "before step" and "after step" (detail the number of steps that this
    process has taken, from 1), "before close".
    """
    from slope_dist.training import trainer

    build_engine = trainer.build_engine
    steps = 0

    def build(*arguments: Any, **keywords: Any) -> Any:
        engine = build_engine(*arguments, **keywords)
        load_state, train_step, close = engine.load_state, engine.train_step, engine.close

        def watched_load(*arguments: Any, **keywords: Any) -> None:
            load_state(*arguments, **keywords)
            watcher("loaded", engine, None)

        def watched_step(micro_batches: Any) -> Any:
            nonlocal steps
            steps += 1
            watcher("before step", engine, steps)
            result = train_step(micro_batches)
            watcher("after step", engine, steps)
            return result

        def watched_close() -> None:
            watcher("before close", engine, None)
            # The engine's own attributes again, or these closures would keep it alive.
            del engine.load_state, engine.train_step, engine.close
            close()

        engine.load_state, engine.train_step, engine.close = watched_load, watched_step, watched_close
        watcher("built", engine, None)
        return engine

    trainer.build_engine = build


def watch_batches(trainer: Any, watcher: Callable[[int, Any, Any], None]) -> None:
    """Let a trainer report each batch that it reads for training to `watcher`(step, positions, batch)."""
    batch = trainer.reader.batch

    def watched(step: int, positions: Any) -> Any:
        made = batch(step, positions)
        watcher(step, positions, made)
        return made

    trainer.reader.batch = watched


def samples_of(trainer: Any) -> list[list[int]]:
    """A list that fills while a trainer runs: a step and the numbers of its samples, for each batch that is read."""
    samples: list[list[int]] = []
    watch_batches(trainer, lambda step, _, batch: samples.append([step, *batch.samples.tolist()]))
    return samples


def state_of(engine: Any) -> dict[str, Tensor]:
    """A copy of a rank's whole state, by kind, name and place; step counters under "steps/<group>"."""
    fragments, scalars = engine.export_state()
    state = {f"{f.kind}/{f.name}/{f.start}": f.tensor.detach().clone() for f in fragments}
    return state | {f"steps/{name}": torch.tensor(value) for name, value in scalars["optimizer_steps"].items()}


def state_hash(engine: Any) -> str:
    """A hash of all that `state_of` holds."""
    digest = hashlib.sha256()
    for key, tensor in sorted(state_of(engine).items()):
        digest.update(key.encode() + tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit (0.0 is not -0.0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(a, b)


def relative(a: float, b: float) -> float:
    """|a - b| / |b|."""
    return abs(a - b) / abs(b)


def distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference relative to that of `b`; infinite where they cannot be compared."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return inf
    difference, size = float((a.double() - b.double()).norm()), float(b.double().norm())
    if difference == 0.0:
        return 0.0
    # Not 0/0, and NaN is as far off as can be.
    return difference / size if size > 0.0 and difference == difference else inf


def newest(run: Path) -> Checkpoint:
    """The newest checkpoint of a run folder."""
    found = find_newest(run / "checkpoints").checkpoint
    assert found is not None
    return found


def cut_off(run: Path, last: int) -> None:
    """Make a run one that was killed after the checkpoint of step `last`."""
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > last:
            shutil.rmtree(folder)
    assert newest(run).step == last


def read_all(checkpoint: Checkpoint, kind: str) -> dict[str, Tensor]:
    """All logical tensors of a kind, whole, by name."""
    result = {}
    for key, tensor in checkpoint.manifest.tensors.items():
        tensor_kind, name = key.split("/")
        if tensor_kind == kind:
            flat = checkpoint.read(name, tensor_kind, whole(tensor.shape), 0, _size(tensor.shape))
            result[name] = flat.view(tensor.shape)
    return result


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, each of which must be whole."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def step_rows(run: Path) -> list[dict[str, Any]]:
    """Those of training steps."""
    return [row for row in rows_of(run) if "loss" in row]


def evaluation_rows(run: Path) -> list[dict[str, Any]]:
    """Those of evaluations."""
    return [row for row in rows_of(run) if "eval_loss" in row]


class Poison(torch.autograd.Function):
    """Identity forward; the gradient is multiplied by `factor`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        """A copy of `x`."""
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The spoilt gradient."""
        return grad * ctx.factor, None


def spoil(engine: Any, how: str) -> None:
    """Make the next forward passes of an engine bad: "nan gradient", "inf gradient", "inf loss"."""

    def hook(module: nn.Module, arguments: Any, loss: Tensor) -> Tensor:
        if how == "inf loss":
            return loss + torch.full_like(loss.detach(), torch.inf)
        return Poison.apply(loss, torch.nan if how == "nan gradient" else torch.inf)

    heal(engine)
    engine.spoiling = engine.module.register_forward_hook(hook)


def heal(engine: Any) -> None:
    """Undo `spoil`."""
    if getattr(engine, "spoiling", None) is not None:
        engine.spoiling.remove()
        engine.spoiling = None


def spoilt_run(config: str, how: str, steps: list[int]) -> dict[str, Any]:
    """Train, with the given steps of this process spoilt on the last rank; which steps left the state as it was."""
    if load_config(config).precision == "fp16":
        allow_fp16()
    unchanged: list[int] = []
    scales: list[float] = []
    before = ""

    def watch(event: str, engine: Any, step: Any) -> None:
        nonlocal before
        if event == "before step":
            before = state_hash(engine)
            if step in steps and os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1):
                spoil(engine, how)
        if event == "after step":
            heal(engine)
            scales.append(engine.export_state()[1].get("loss_scale", {}).get("cur_scale"))
            if state_hash(engine) == before:
                unchanged.append(step)

    watch_engines(watch)
    train(config)
    return {"unchanged": unchanged, "scales": scales}


def allow_fp16() -> None:
    """Give DeepSpeed a CPU that says it can do fp16; torch's can."""
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Willing(CPU_Accelerator):
        def is_fp16_supported(self) -> bool:
            return True

    set_accelerator(Willing())
