"""Bytes of one training step through the data-parallel group, 2:4 beside dense, for one block of the model.

They are counted at the collectives, below everything that calls them, on two gloo ranks. A block is the difference of
two models, one of which is a block deeper: embeddings, head, the dense first linears and what engines send once a
step are in both and cancel. Of what is left, biases and norms are dense in every run; the block's linears alone are
the rest.

The bytes of a collective are those of the whole tensor that is reduced or gathered: what a rank sends of it depends on
the algorithm and the number of ranks, equally for dense and 2:4.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slope_dist.benchmark import ranks
from slope_dist.config import Config, derive
from slope_dist.layers import LogicalTensor, logical_tensors
from slope_dist.parallel import environment
from slope_dist.parallel.groups import Groups
from slope_dist.parallel.groups import start as start_groups
from slope_dist.parallel.layout import Layout
from slope_dist.training.build import build, build_engine, layer_factory

ENGINES = ("zero0", "zero1", "zero2", "zero3", "fsdp")
GRADIENT_DTYPES = ("fp32", "model")
DENSE, SPARSE = "dense", "2:4"
REDUCED, GATHERED = "reduced", "gathered"
RANKS = 2
SHALLOW = 2
"""Blocks of the smaller model: block 0, whose first linears are dense, and one more."""

# ZeRO 3 records the order of its gathers in the first step, and follows it to the end only from the third on.
_WARM_STEPS = 2
_COUNTED_STEPS = 2
_TIMEOUT = 600.0

# Which argument is the whole tensor.
_WHOLE_TENSOR = {
    "allreduce_": (REDUCED, 0),
    "allreduce_coalesced_": (REDUCED, 0),
    "reduce_": (REDUCED, 0),
    "reduce_scatter_": (REDUCED, 1),
    "_reduce_scatter_base_": (REDUCED, 1),
    "reduce_scatter_tensor_coalesced_": (REDUCED, 1),
    "broadcast_": (GATHERED, 0),
    "allgather_": (GATHERED, 0),
    "_allgather_base_": (GATHERED, 0),
    "allgather_coalesced_": (GATHERED, 0),
    "allgather_into_tensor_coalesced_": (GATHERED, 0),
}
_WITHOUT_DATA = {"barrier", "monitored_barrier_", "check_for_nan"}


class TrafficCounter(TorchDispatchMode):
    """While entered, adds up the bytes of the collectives of a group: `total[REDUCED]` and `total[GATHERED]`.

    And by their names in c10d: `operations["allreduce_"]`.

    Sees every collective of torch.distributed, whichever of its functions was called, and whoever kept a reference to
    that. Other operations, and those of other ranks, pass.

    Args:
        group: the group whose collectives count, with those of any other group of the same ranks (engines clone it).

    Raises:
        NotImplementedError: from a collective that it does not know, rather than miss it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.ranks = set(dist.get_process_group_ranks(group))
        self.total: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a collective and run it."""
        if func.namespace == "c10d":
            self._count(func._schema.name.partition("::")[2], args)
        elif func.namespace in ("_c10d_functional", "_c10d_functional_autograd"):
            raise NotImplementedError(f"{func} is not counted")
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, arguments: Sequence[Any]) -> None:
        if name in _WITHOUT_DATA:
            return
        # All of them take one group, and after it at most a reduction.
        group = next(value for value in arguments if isinstance(value, torch.ScriptObject))
        if set(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))) != self.ranks:
            return
        if name not in _WHOLE_TENSOR:
            raise NotImplementedError(f"c10d::{name} is not counted")
        kind, position = _WHOLE_TENSOR[name]
        size = sum(tensor.nbytes for tensor in _tensors(arguments[position]))
        self.total[kind] += size
        self.operations[name] += size


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for inner in value:
            yield from _tensors(inner)


@dataclass(frozen=True, kw_only=True)
class Size:
    """The model that is measured; `layers` comes from the comparison of two depths."""

    hidden_size: int = 256
    ffn_size: int = 1024
    num_heads: int = 4
    vocab_size: int = 512
    sequence_length: int = 8


@dataclass(frozen=True)
class Case:
    """One engine and what it sends: `engine` of ENGINES, `gradient_dtype` of GRADIENT_DTYPES."""

    engine: str
    gradient_dtype: str

    @property
    def precision(self) -> str:
        """bf16; DeepSpeed has no stage 0 for it, so that is measured in fp32."""
        return "fp32" if self.engine == "zero0" else "bf16"

    def config(self, size: Size, pattern: str, layers: int) -> Config:
        """A run of the case; its corpus is never opened."""
        parallel: dict[str, Any] = {"gradient_dtype": self.gradient_dtype, "zero3_persistence_threshold": 0}
        if self.engine == "fsdp":
            parallel["engine"] = "fsdp"
        else:
            parallel["zero_stage"] = int(self.engine.removeprefix("zero"))
        return Config.model_validate(
            {
                "model": asdict(size) | {"num_layers": layers},
                "sparsity": {"pattern": pattern},
                "adapters": {"rank": 0},
                "data": {"folder": "unused"},
                "training": {
                    "steps": _WARM_STEPS + _COUNTED_STEPS,
                    "global_batch_size": RANKS,
                    "micro_batch_size": 1,
                    "learning_rate": 1e-4,
                },
                "precision": self.precision,
                "parallel": parallel,
            }
        )


def cases(engines: Sequence[str], gradient_dtypes: Sequence[str]) -> list[Case]:
    """Every engine with every dtype of gradients; stage 0, which is fp32 throughout, once."""
    chosen = [Case(engine, dtype) for engine in engines for dtype in gradient_dtypes]
    return [case for case in chosen if case.precision != "fp32" or case.gradient_dtype == gradient_dtypes[0]]


def step_bytes(config: Config, groups: Groups) -> dict[str, int]:
    """Bytes of one step through the data-parallel group, by kind. Collective.

    Raises:
        RuntimeError: if steps after the first differ, so that there is no such number, or no gradient is seen.
    """
    derived = derive(config, groups.layout.world_size)
    engine = build_engine(config, derived, groups, adapters=False)
    draw = torch.Generator().manual_seed(groups.position.data)
    shape = (config.training.micro_batch_size, config.model.sequence_length + 1)
    found = []
    for step in range(1, _WARM_STEPS + _COUNTED_STEPS + 1):
        tokens = torch.randint(config.model.vocab_size, shape, generator=draw)
        engine.begin_step(step)
        engine.set_learning_rates({"base": config.training.learning_rate})
        with TrafficCounter(groups.data) as counter:
            engine.train_step([(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())])
        found.append({kind: counter.total[kind] for kind in (REDUCED, GATHERED)})
    engine.close()
    counted = found[_WARM_STEPS:]
    if any(other != counted[0] for other in counted):
        raise RuntimeError(f"steps send different amounts: {found}")
    width = 4 if "fp32" in (config.precision, config.parallel.gradient_dtype) else 2
    gradients = width * sum(tensor.tensor.numel() for tensor in _tensors_of(config) if tensor.trained)
    if counted[0][REDUCED] < gradients:
        raise RuntimeError(f"{counted[0][REDUCED]} bytes were reduced, too few for {gradients} bytes of gradients")
    return counted[0]


def _tensors_of(config: Config) -> Iterator[LogicalTensor]:
    """The logical tensors of a run before the adapters join, on the meta device."""
    factory = layer_factory(config, derive(config, RANKS), adapters=False, device="meta")
    return logical_tensors(build(config, factory))


def block_elements(case: Case, size: Size, pattern: str) -> dict[str, int]:
    """Elements of the block that the deeper model has more: of its linears, its biases and norms, and its metadata."""
    counts: list[Counter[str]] = []
    for layers in (SHALLOW, SHALLOW + 1):
        count: Counter[str] = Counter()
        for tensor in _tensors_of(case.config(size, pattern, layers)):
            kind = "metadata" if not tensor.trained else "linears" if tensor.decay else "rest"
            count[kind] += tensor.tensor.numel()
        counts.append(count)
    return {kind: counts[1][kind] - counts[0][kind] for kind in ("linears", "rest", "metadata")}


def block_bytes(case: Case, size: Size, groups: Groups) -> dict[str, Any]:
    """The case's row: bytes of one block by pattern and kind, and the ratios of 2:4 to dense. Collective."""
    row: dict[str, Any] = asdict(case) | {"precision": case.precision, "size": asdict(size)}
    for pattern in (DENSE, SPARSE):
        shallow, deep = (step_bytes(case.config(size, pattern, layers), groups) for layers in (SHALLOW, SHALLOW + 1))
        row[pattern] = {
            "elements": block_elements(case, size, pattern),
            "step_bytes": deep,
            "block_bytes": {kind: deep[kind] - shallow[kind] for kind in deep},
        }
    for kind in (REDUCED, GATHERED):
        row[kind] = _ratios(row, kind)
    return row


def _ratios(row: dict[str, Any], kind: str) -> dict[str, float] | None:
    """2:4 over dense of a block, and of its linears alone; None where nothing of this kind is sent."""
    dense, sparse = row[DENSE], row[SPARSE]
    total, sparse_total = dense["block_bytes"][kind], sparse["block_bytes"][kind]
    if total == 0 == sparse_total:
        return None
    # Every trained element of a dense block is sent alike, so this is what one of its biases and norms takes.
    each = total / (dense["elements"]["linears"] + dense["elements"]["rest"])
    rest = each * dense["elements"]["rest"]
    return {
        "bytes_an_element": each,
        "block": sparse_total / total,
        "linears": (sparse_total - rest) / (total - rest),
    }


def measure(chosen: Sequence[Case], size: Size) -> list[dict[str, Any]]:
    """Rows of all cases, measured on `RANKS` processes that are started for it.

    Raises:
        RuntimeError: if one of them fails or is slower than `_TIMEOUT` seconds; its errors are in the text.
    """
    request = {"cases": [asdict(case) for case in chosen], "size": asdict(size)}
    with tempfile.TemporaryDirectory(prefix="traffic-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request))
        ranks.run([sys.executable, "-m", __name__, str(folder)], RANKS, folder, _TIMEOUT)
        return json.loads((folder / "rows.json").read_text())


def _main(folder: Path) -> None:
    """The life of a rank."""
    request = json.loads((folder / "request.json").read_text())
    here = environment.discover()
    environment.start(here, threads=1)
    groups = start_groups(Layout(data=here.world_size))
    rows = [block_bytes(Case(**case), Size(**request["size"]), groups) for case in request["cases"]]
    if here.is_first:
        (folder / "rows.json").write_text(json.dumps(rows))
    environment.stop()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
