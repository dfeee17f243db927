"""What a run takes on a cluster, before a GPU is held: does it fit, how long does it take, which layout is best?

    python tools/plan.py --config configs/opt66b.json --gpu a100-80gb --gpus-per-node 8 --nodes 4
    python tools/plan.py --config configs/opt66b.json --gpu a100-80gb --nodes 4 --search
    python tools/plan.py --config configs/llama3-8b.json --gpu h200-141gb --nodes 2 --gemm docs/results/gemm-h200.json
    python tools/plan.py --gpu h200-141gb --gemm gemm.json --validate block.json

Memory is predicted for every pipeline stage: model state, the engine's buffers and the activations of the fullest
moment, before the adapters, while they join and with them, beside the dense run. Time comes from products, links and
the pipeline; products from a file of `tools/benchmark.py gemm` of that card, else from its peaks and assumptions. Times
are UNVALIDATED unless --checked-by names measured blocks or steps of that card, and all are met within 15 %. Of a file
of measurements the rows in the precision of the config count, without a config those in bf16. How, and how well that
has been checked: docs/planning.md. Nothing is written.

--search tries every layout that is legal on all GPUs: tensor and sequence parallelism, pipeline, ZeRO stage or FSDP2,
micro-batch and recomputation. --validate compares predictions with results of `tools/benchmark.py block` or `step`.

exit codes:
  0  done
  1  --validate: a prediction is off by more than 15 %
  2  the command line, the config or a file is wrong; with a config: its layout does not fit so many ranks
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from slope_dist.command_line import Parser, answer, path_argument
from slope_dist.config import Config, load_config
from slope_dist.config.sections import Precision
from slope_dist.errors import UserError
from slope_dist.planning.cluster import Cluster
from slope_dist.planning.products import ProductTimes, Roofline, read_measured
from slope_dist.planning.step_time import Machine
from slope_dist.planning.traffic import WIDTH

if TYPE_CHECKING:
    from slope_dist.benchmark.prediction import Prediction

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
EXIT_FAR_OFF = 1
SHOWN = 12


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--config", help="JSON file that describes the run")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="change one value")
    parser.add_argument("--gpu", help="kind of the GPUs; default: parallel.gpu of the config")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--nodes", type=int, help="default: as many as parallel.gpus of the config asks for")
    parser.add_argument("--inside-gb", type=float, help="GB/s that a GPU sends within its node; default: of the kind")
    parser.add_argument("--between-gb", type=float, help="GB/s that a GPU sends to other nodes; default: of the kind")
    parser.add_argument("--gemm", type=path_argument, help="results of tools/benchmark.py gemm on such a card")
    parser.add_argument(
        "--checked-by", type=path_argument, metavar="FILE", help="results of block or step on such a card"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--search", action="store_true", help="rank all legal layouts")
    what.add_argument("--validate", type=path_argument, metavar="FILE", help="compare with measured blocks or steps")
    parser.add_argument("--top", type=int, default=SHOWN, help=f"layouts that --search shows ({SHOWN})")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Answer; returns the exit code."""
    # Told before anything is printed: whoever reads it may leave.
    found: list[int] = []
    code = answer(lambda: _run(_parser().parse_args(arguments), found.append))
    return code or (found[0] if found else 0)


def _run(options: argparse.Namespace, tell: Callable[[int], None]) -> None:
    if options.top < 1:
        raise UserError(f"--top {options.top}: must be at least 1")
    if options.config is None and options.validate is None:
        raise UserError("--config is required (or --validate); see plan.py --help")
    config = None if options.config is None else load_config(options.config, options.set)
    cluster = _cluster(options, config)
    precision: Precision = "bf16" if config is None else config.precision
    times: ProductTimes = Roofline(cluster.gpu, cluster.peaks, WIDTH[precision])
    if options.gemm is not None:
        times = read_measured(options.gemm, cluster.gpu, precision)
    if options.validate is not None:
        _validate(options, cluster, times, precision, tell)
        return
    assert config is not None
    if options.search:
        _search(options, cluster, times, precision)
    else:
        _plan(options, config, cluster, times)


def _cluster(options: argparse.Namespace, config: Config | None) -> Cluster:
    parallel = None if config is None else config.parallel
    gpu = options.gpu or (parallel and parallel.gpu)
    if not gpu:
        raise UserError("--gpu is required where the config has no parallel.gpu")
    nodes = options.nodes
    if nodes is None:
        # What is validated was measured on one card.
        gpus = 1 if parallel is None or options.validate is not None else parallel.gpus
        if gpus is None:
            raise UserError("--nodes is required where the config has no parallel.gpus")
        if options.gpus_per_node < 1 or gpus % min(options.gpus_per_node, gpus):
            raise UserError(
                f"parallel.gpus {gpus} are no whole nodes of --gpus-per-node {options.gpus_per_node}; "
                f"give one that divides {gpus}"
            )
        options.gpus_per_node = min(options.gpus_per_node, gpus)
        nodes = gpus // options.gpus_per_node
    return Cluster.of(gpu, options.gpus_per_node, nodes, options.inside_gb, options.between_gb)


def _validate(
    options: argparse.Namespace,
    cluster: Cluster,
    times: ProductTimes,
    precision: Precision,
    tell: Callable[[int], None],
) -> None:
    from slope_dist.benchmark.prediction import CLOSE
    from slope_dist.training.plan_screen import table_of

    found = _compared(options.validate, cluster, times, precision)
    close = sum(one.is_close for one in found)
    tell(0 if close == len(found) else EXIT_FAR_OFF)
    if options.json:
        print(json.dumps([vars(one) | {"ratio": one.ratio} for one in found], indent=1))
    else:
        table = table_of("cell", "form", "measured ms", "predicted ms", "ratio")
        for one in found:
            milliseconds = f"{1e3 * one.measured:.3f}", f"{1e3 * one.predicted:.3f}"
            table.add_row(one.cell, one.rival, *milliseconds, f"{one.ratio:.3f}")
        _console().print(table)
    print(f"{close} of {len(found)} within {CLOSE:.0%}; products {times.basis}", file=sys.stderr)


def _compared(path: Path, cluster: Cluster, times: ProductTimes, precision: Precision) -> list[Prediction]:
    from slope_dist.benchmark.prediction import compare

    configs = {path.stem: load_config(path) for path in sorted(CONFIGS.glob("*.json"))}
    machine = Machine(times, cluster.peaks)
    found = list(compare(path, _benchmark_of(path), configs, cluster.gpu, machine, precision))
    if not found:
        raise UserError(f"{path} has no measured cells")
    return found


def _benchmark_of(path: Path) -> str:
    from slope_dist.planning.products import benchmark_of

    name = benchmark_of(path)
    if name not in ("block", "step"):
        raise UserError(f'{path} holds results of "{name}"; those of "block" or "step" are compared with')
    return name


def _search(options: argparse.Namespace, cluster: Cluster, times: ProductTimes, precision: Precision) -> None:
    from slope_dist.training.plan_screen import table_of
    from slope_dist.training.search import overrides, search
    from slope_dist.transfer import duration_text, size_text

    # What the command line sets is searched around.
    held = {change.partition("=")[0].strip() for change in options.set}
    of_one_layout = {"parallel.gpus": None, "parallel.alternatives": []}

    def make(changes: dict[str, object]) -> Config:
        others = {name: value for name, value in (of_one_layout | changes).items() if name not in held}
        return load_config(options.config, [*options.set, *overrides(others)])

    with Console(stderr=True).status("layouts") as status:
        found = search(make, cluster, times, held, lambda done, total: status.update(f"layout {done} of {total}"))
    if not found:
        raise UserError(
            f"{options.config}: no layout{' with these --set' if held else ''} is legal on {cluster.gpus} GPUs: tensor "
            "ranks divide model.num_heads, and data ranks x training.micro_batch_size divide training.global_batch_size"
        )
    if options.json:
        rows = [
            {"changes": c.changes, "fits": c.fits, "bytes": c.most, "seconds": c.seconds, "why_not": c.why_not}
            for c in found
        ]
        print(json.dumps(rows, indent=1))
        return
    fitting = [candidate for candidate in found if candidate.fits]
    lines = [
        f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu}: {len(found)} layouts, of which {len(fitting)} fit",
        _times_line(options, cluster, times, precision),
    ]
    _console().print("\n".join(lines), highlight=False)
    table = table_of("layout", "memory a rank", "step", "tokens/s")
    for candidate in fitting[: options.top]:
        rate = candidate.derived.tokens_per_step / candidate.seconds
        table.add_row(candidate.text(), size_text(candidate.most), duration_text(candidate.seconds), f"{rate:,.0f}")
    _console().print(table)
    if fitting:
        shown = " ".join(f"--set {change}" for change in overrides(fitting[0].changes))
        _console().print(f"the first of them: {shown}", highlight=False, soft_wrap=True)
    others = [candidate for candidate in found if not candidate.fits]
    if others:
        table = table_of("does not fit", "why")
        for candidate in others[: options.top]:
            table.add_row(candidate.text(), candidate.why_not)
        _console().print(table)


def _plan(options: argparse.Namespace, config: Config, cluster: Cluster, times: ProductTimes) -> None:
    from slope_dist.training.plan import make_plan, to_data
    from slope_dist.training.plan_screen import show

    plan = make_plan(config, cluster, times, measured=options.gemm is not None)
    if options.json:
        print(json.dumps(to_data(plan), indent=1))
    else:
        show(plan, _console(), _times_line(options, cluster, times, config.precision))


def _times_line(options: argparse.Namespace, cluster: Cluster, times: ProductTimes, precision: Precision) -> str:
    from slope_dist.benchmark.prediction import CLOSE

    if options.checked_by is None:
        return f"times: UNVALIDATED; products {times.basis}"
    found = _compared(options.checked_by, cluster, times, precision)
    off = sum(not one.is_close for one in found)
    cells = f"of {len(found)} measured cells in {options.checked_by}"
    verdict = f"UNVALIDATED, {off} {cells} are not met" if off else f"all {cells} are met"
    return f"times: {verdict} within {CLOSE:.0%}; products {times.basis}"


class _Screen(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to `answer`; rich would end the program with 1."""
        raise BrokenPipeError


def _console() -> Console:
    # Into a file or a pipe as wide as it needs to be.
    return _Screen() if sys.stdout.isatty() else _Screen(width=200)


if __name__ == "__main__":
    sys.exit(main())
