"""What a run takes of each GPU, told before it is run, and which layouts fit.

    python tools/plan.py --config configs/opt66b.json --gpu a100-80gb --gpus-per-node 8 --nodes 4
    python tools/plan.py --config configs/gpt2-xl.json --gpu a100-40gb --gpus-per-node 4 --search
    python tools/plan.py --config configs/opt13b.json --gpu h100-80gb --gpus-per-node 8 --json

Per pipeline stage: trained elements, and bytes at the peak before the adapters join, while they join, and after, 2:4
beside dense. All of it is predicted, from the config alone; docs/planning.md says how, and how well it was met.
With --search, all legal layouts for these GPUs, those that fit first.

exit codes:
  0  done, whether the run fits or not
  2  the command line or the config is wrong, or the layout does not divide the GPUs
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from slope_dist.command_line import Parser, answer
from slope_dist.config import Config, Derived, derive, load_config
from slope_dist.errors import UserError
from slope_dist.planning import GPU_MEMORY
from slope_dist.planning.peaks import Peak
from slope_dist.training.forecast import MARGIN, StageMemory, forecast
from slope_dist.training.search import Candidate, overrides, search
from slope_dist.transfer import size_text

NOT_MODELLED = (
    "the CUDA context, NCCL's buffers, libraries' workspaces and fragmentation, for which the margin is left free",
    "evaluation, and what torch.compile keeps or saves",
    "as to activations, blocks that differ from the second by sparsity.dense_layers or sparsity.layer_patterns, and "
    "patterns other than 2:4, which are taken to be 2:4",
)
SHOWN = 20


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: an option is unknown, missing or out of range.
    """
    parser = Parser(__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one value of it")
    parser.add_argument("--gpu", choices=sorted(GPU_MEMORY), help="kind of GPU; else parallel.gpu of the config")
    parser.add_argument("--gpus-per-node", type=_count, default=8, metavar="N", help="default 8")
    parser.add_argument("--nodes", type=_count, default=1, metavar="N", help="default 1")
    parser.add_argument("--search", action="store_true", help="rank all legal layouts instead")
    parser.add_argument("--json", action="store_true", help="for machines: bytes, not words")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def plan(options: argparse.Namespace) -> None:
    """Print the plan of one layout, or of all.

    Raises:
        UserError: the config is wrong, or its layout does not divide the GPUs.
    """
    config = load_config(options.config, options.set)
    gpu = options.gpu or config.parallel.gpu
    if gpu is None:
        raise UserError(f"--gpu is needed, for parallel.gpu names none: one of {', '.join(sorted(GPU_MEMORY))}")
    gpus, memory = options.nodes * options.gpus_per_node, GPU_MEMORY[gpu]
    if options.search:
        found = search(
            lambda changes: load_config(options.config, _set(options.set, overrides(changes))),
            gpus=gpus,
            gpus_per_node=options.gpus_per_node,
            memory=memory,
        )
        _print_search(found, options.json, f"{gpus} x {gpu}")
        return
    derived = derive(config, gpus)
    if config.parallel.tensor > options.gpus_per_node:
        raise UserError(
            f"parallel.tensor {config.parallel.tensor} is more than --gpus-per-node {options.gpus_per_node}: tensor "
            "ranks would speak over the network at every layer"
        )
    sparse = forecast(config, derived, on_gpu=True)
    dense = None if config.sparsity.group is None else _dense(options, gpus)
    if options.json:
        print(json.dumps(_as_json(config, derived, gpu, sparse, dense), indent=1))
        return
    parallel = config.parallel
    print(
        f"{Path(options.config).name} on {gpus} x {gpu}: tensor {parallel.tensor} x pipeline {parallel.pipeline} x "
        f"data {derived.data_ranks}; predicted, not measured"
    )
    for number, stage in enumerate(sparse):
        print(f"stage {number + 1} of {len(sparse)}: {stage.trained:,} trained elements a rank")
        for line in _stage_lines(stage, "2:4" if dense else "dense"):
            print(f"  {line}")
        if dense is not None:
            print(f"  {_peak_line('dense', dense[number].before, dense[number])}")
    for name, stages in (("2:4", sparse), ("dense", dense)) if dense else (("dense", sparse),):
        if stages is not None:
            print(_verdict(name, stages, memory))
    print("not modelled: " + "; ".join(NOT_MODELLED))


def _dense(options: argparse.Namespace, gpus: int) -> tuple[StageMemory, ...]:
    """The dense run of the same layout."""
    keys = ("pattern=dense", "column_mask_interval=1", "layer_patterns=[]", "backward_weight=auto")
    changes = [f"sparsity.{key}" for key in keys]
    config = load_config(options.config, _set(options.set, changes))
    return forecast(config, derive(config, gpus), on_gpu=True)


def _set(given: list[str], changes: list[str]) -> list[str]:
    """The changes, and what was given of other keys: no key may be set twice."""
    keys = {change.partition("=")[0] for change in changes}
    return [*(change for change in given if change.partition("=")[0] not in keys), *changes]


def _stage_lines(stage: StageMemory, name: str) -> list[str]:
    lines = [_peak_line(f"{name}, before the adapters" if stage.after else name, stage.before, stage)]
    if stage.after is not None and stage.switch is not None:
        lines.append(f"{name}, while they join: {size_text(stage.switch)}")
        lines.append(_peak_line(f"{name}, with them", stage.after, stage, phase=1))
    if stage.copy:
        lines.append(f"{name}, copy for checkpoints in host memory: {size_text(stage.copy)}")
    return lines


def _peak_line(name: str, peak: Peak, stage: StageMemory, phase: int = 0) -> str:
    parts = ", ".join(f"{kind} {size_text(size)}" for kind, size in _parts(peak, stage, phase).items() if size)
    return f"{name}: {size_text(peak.bytes)} in {peak.moment} ({parts})"


def _parts(peak: Peak, stage: StageMemory, phase: int) -> dict[str, int]:
    """What the peak is made of. Gradients that do not stay between steps are among the buffers."""
    state = stage.states[phase]
    parts = {
        "weights": state.weights,
        "metadata": state.metadata + state.kernel_metadata,
        "transposes": state.transposes,
        "optimizer": state.optimizer,
    }
    parts["gradients that stay, and their bucket"] = peak.state - sum(parts.values())
    return parts | {"gradients and buffers of a step": peak.buffers, "activations": peak.activations}


def _verdict(name: str, stages: tuple[StageMemory, ...], memory: int) -> str:
    most = max(stage.most for stage in stages)
    fits = "fits" if most * MARGIN <= memory else "may not fit" if most <= memory else "does not fit"
    return f"{name}: {fits}: {size_text(most)} at most, and {MARGIN - 1:.0%} free, of {size_text(memory)}"


def _as_json(
    config: Config, derived: Derived, gpu: str, sparse: tuple[StageMemory, ...], dense: tuple[StageMemory, ...] | None
) -> dict[str, Any]:
    memory = GPU_MEMORY[gpu]

    def described(stages: tuple[StageMemory, ...]) -> dict[str, Any]:
        most = max(stage.most for stage in stages)
        return {"most": most, "fits": MARGIN * most <= memory, "stages": [_stage_json(stage) for stage in stages]}

    name = "dense" if config.sparsity.group is None else "sparse"
    found: dict[str, Any] = {
        "gpu": gpu,
        "memory": memory,
        "measured": False,
        "ranks": derived.world_size,
        "data_ranks": derived.data_ranks,
        name: described(sparse),
        "not_modelled": list(NOT_MODELLED),
    }
    return found if dense is None else found | {"dense": described(dense)}


def _stage_json(stage: StageMemory) -> dict[str, Any]:
    phases = {"before": (stage.before, 0)} | ({} if stage.after is None else {"after": (stage.after, 1)})
    found: dict[str, Any] = {"trained": stage.trained, "switch": stage.switch, "copy": stage.copy}
    for name, (peak, phase) in phases.items():
        found[name] = {"bytes": peak.bytes, "moment": peak.moment, "parts": _parts(peak, stage, phase)}
    return found


def _print_search(found: list[Candidate], as_json: bool, where: str) -> None:
    if as_json:
        rows = [{"changes": c.changes, "fits": c.fits, "most": c.most, "why_not": c.why_not or None} for c in found]
        print(json.dumps({"measured": False, "layouts": rows}, indent=1))
        return
    fitting = [candidate for candidate in found if candidate.fits]
    print(f"{len(found)} legal layouts on {where}, of which {len(fitting)} fit; least memory first; predicted")
    for candidate in fitting[:SHOWN]:
        print(f"  {candidate.text()}: {size_text(candidate.most)}")
    for candidate in [c for c in found if not c.fits][:SHOWN]:
        print(f"  does not fit: {candidate.text()}: {candidate.why_not}")
    if len(found) > 2 * SHOWN:
        print("  (--json has all of them)")


def main(arguments: list[str] | None = None) -> int:
    """Plan; returns the exit code."""
    return answer(lambda: plan(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
