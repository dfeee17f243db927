"""Memory and speed of a loaded model: compressed beside dense, each read from its own files by a process of its own.

Dense is the form that others load ("hf"), with the adapters added in, as a dense model is served. The weights are no
trained ones: their memory and speed are the same.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slope_dist.benchmark import memory
from slope_dist.benchmark.timing import WrongResultError
from slope_dist.config import Config
from slope_dist.data.tokenizer import Tokenizer
from slope_dist.errors import UserError
from slope_dist.export.exporting import export_of
from slope_dist.export.options import Options
from slope_dist.export.stored import Origin, StoredModel, forms_of
from slope_dist.export.target import new_folder
from slope_dist.models import Decoding
from slope_dist.sparse import codec, pattern_of
from slope_dist.transfer import Transfer

DENSE, COMPRESSED = "dense", "compressed"
RIVALS = {DENSE: "hf", COMPRESSED: "slope"}
"""Which form each is loaded from."""

SIZES = ("file_bytes", "linear_bytes", "weight_bytes", "resident_bytes", "peak_bytes", "use_peak_bytes")
"""What is measured of each: its files, the weights of its linear layers, all weights, what loading adds to the
anonymous memory, the most of it while loading and the most while computing."""

BOUND = 0.1
"""Relative norm that the logits of the two may differ by, with the rounding of merged weights; other ones have 1.4."""

_POOL = 1021
_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a loaded model does.

    Attributes:
        prompt: tokens that are read at once.
        seconds: about how long reading is timed, and then writing one token after another.
    """

    prompt: int = 64
    seconds: float = 5.0


class RandomModel(StoredModel):
    """The model that a run of a config ends with, in files nowhere: rows of random numbers, made when they are read.

    Those of a tensor repeat after a while, so that making them takes no time.
    """

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        self.model = config.model
        self.dtype = dtype
        self.origin = Origin(Path("random"), "checkpoint")
        self.linears = forms_of(self.skeleton, config, config.adapter_rank)
        # Kept for each width: there are few.
        self._rows = cache(self._pool)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """See `StoredModel`."""
        shape = self.shapes[name]
        rows = torch.arange(start, shape[0] if stop is None else stop) + zlib.crc32(name.encode())
        if name.endswith(".weight.indices"):
            pattern = str(self.linears[name.removesuffix(".weight.indices")].pattern)
            return self._rows(shape[1], pattern)[rows % _POOL]
        found = self._rows(shape[1] if len(shape) > 1 else 1, None)[rows % _POOL]
        if len(shape) > 1:
            # A first factor begins as one of unit entries.
            return found / _STD if name.endswith(".adapter.down") else found
        return found.flatten() + (1 if name.endswith("weight") else 0)

    def tokenizer(self) -> Tokenizer:
        """None."""
        raise UserError("a random model has no tokenizer")

    def _pool(self, width: int, pattern: str | None) -> Tensor:
        draw = torch.Generator().manual_seed(width)
        if pattern is None:
            return (torch.randn(_POOL, width, generator=draw) * _STD).to(self.dtype)
        group = pattern_of("", pattern, ())
        order = torch.rand(_POOL, width * 8 // group.m, group.m, generator=draw).argsort(dim=2)
        return codec.pack((order < group.n).view(_POOL, -1), group)


def measure(
    config: Config, dtype: torch.dtype, work: Work, folder: Path | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Write, load and measure each rival, one after the other; at one time the files of one are on the disk.

    Args:
        config: of a run; `model`, `sparsity` and `adapters` count.
        dtype: of the numbers.
        work: what is timed.
        folder: where to put files meanwhile; None: the system's temporary folder.
        say: told what is being done.

    Raises:
        UserError: there is no room for the files.
        WrongResultError: the two are not the same model.
    """
    stored = RandomModel(config, dtype)
    rivals: dict[str, dict[str, Any]] = {}
    outputs = {}
    with tempfile.TemporaryDirectory(prefix="inference-", dir=folder) as place:
        for name, form in RIVALS.items():
            say(f"{name}: writing")
            options = Options(tokenizer=False, merge_adapters=form == "hf" and stored.has_adapters)
            export = export_of(stored, form, options)
            with tempfile.TemporaryDirectory(dir=place) as own:
                target = Path(own, form)
                with new_folder(target, export.bytes) as files:
                    export.write(files, Transfer())
                size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
                say(f"{name}: loading")
                rivals[name] = {"file_bytes": size} | _measured(target, work)
            outputs[name] = torch.tensor(rivals[name].pop("logits"))
    dense, compressed = outputs[DENSE], outputs[COMPRESSED]
    difference = float((compressed - dense).norm() / dense.norm())
    # Also where it is NaN.
    if not difference <= BOUND:
        raise WrongResultError(f"the logits of the two differ by {difference:.2g} of their norm")
    return {
        "family": config.model.family,
        "parameters": sum(shape[0] * shape[1] for shape, _ in stored.skeleton.linears.values())
        + sum(torch.Size(shape).numel() for shape in stored.skeleton.others.values()),
        "dtype": str(dtype).removeprefix("torch."),
        "adapter_rank": config.adapter_rank if stored.has_adapters else 0,
        "prompt": work.prompt,
        "rivals": rivals,
        "ratios": {name: rivals[COMPRESSED][name] / rivals[DENSE][name] for name in SIZES},
        "logits_difference": difference,
    }


def _measured(path: Path, work: Work) -> dict[str, Any]:
    """What `main` prints in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, str(path), str(work.prompt), str(work.seconds)]
    command.append(str(torch.get_num_threads()))
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the process that loads {path.name} ended with code {done.returncode}")
    return json.loads(done.stdout)


def main(path: str, prompt: str, seconds: str, threads: str) -> None:
    """Load a model, use it, and print what that took as JSON."""
    # All that loading needs, before memory is looked at.
    from slope_dist.export import huggingface_model, slope  # noqa: F401
    from slope_dist.inference import load_model

    torch.set_num_threads(int(threads))
    # What a product allocates once.
    torch.nn.functional.linear(torch.ones(64, 64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16))
    gc.collect()
    memory.return_free_heap()
    before = memory.anonymous_bytes()
    start = time.perf_counter()
    with memory.AnonymousPeak() as loading:
        model = load_model(Path(path))
    load_seconds = time.perf_counter() - start
    after = memory.anonymous_bytes()
    length = int(prompt)
    tokens = (torch.arange(length) * 7919 % model.vocab_size).unsqueeze(0)
    with memory.AnonymousPeak() as using:
        logits = model.logits(tokens)[0, -1].float()
        reading = _rate(lambda: model.logits(tokens), float(seconds)) * length
        capacity = min(model.context, length + 512)
        decoding = Decoding(torch.zeros(1, dtype=torch.int64), capacity)
        model.logits(tokens, decoding)
        writing = _rate(lambda: model.logits(tokens[:, :1], decoding), float(seconds), capacity - length)
    numbers = {
        "linear_bytes": model.linear_bytes,
        "weight_bytes": model.weight_bytes,
        "before_bytes": before,
        "resident_bytes": after - before,
        "peak_bytes": loading.bytes - before,
        "use_peak_bytes": using.bytes - before,
        "load_seconds": load_seconds,
        "prompt_tokens_per_second": reading,
        "tokens_per_second": writing,
        "logits": logits[:4096].tolist(),
    }
    print(json.dumps(numbers))


def _rate(work: Callable[[], object], seconds: float, most: int = 10**9) -> float:
    """How often a second; once at least."""
    start = time.perf_counter()
    times = 0
    while times == 0 or (times < most and time.perf_counter() - start < seconds):
        work()
        times += 1
    return times / (time.perf_counter() - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
