"""Speed and memory of the program's parts, each beside its dense baseline in the same run.

    python tools/benchmark.py layer
    python tools/benchmark.py layer --widths 512 1024 --dtypes bf16 --threads 1 --output layer.json
    python tools/benchmark.py traffic
    python tools/benchmark.py checkpoint --folder /where/checkpoints/go
    python tools/benchmark.py loader
    python tools/benchmark.py data --megabytes 80
    python tools/benchmark.py inference --config configs/opt1.3b.json --folder /where/models/go
    python tools/benchmark.py gemm --minutes 20 --output gemm.json
    python tools/benchmark.py block --output block.json
    python tools/benchmark.py step --output step.json
    python tools/benchmark.py decode --output decode.json
    python tools/benchmark.py refresh --output refresh.json

layer: forward and backward of a linear layer. The sparse results are checked against dense masked products first; a
wrong one is not timed (exit code 1). "derived" makes the doubly pruned transpose in each backward, "resident" rebuilds
it once a step.

traffic: bytes that one block of the model sends through the data-parallel group in a step, counted on two ranks which
the command starts itself on the CPU. "linears" is the block without its biases and norms, which are dense in every run.

checkpoint: saves and loads of the same state, dense and 2:4, by slope_dist, torch.distributed.checkpoint and DeepSpeed
itself, on two ranks which the command starts. Each is first seen to load what it saved; a wrong one is not timed.

loader: batches read from a corpus that the command writes, by slope_dist and by Megatron-core's GPTDataset, and what
reading all of it once adds to the memory that the process holds.

data: a .jsonl file made for it to tokens on disk, by prepare and by datasets.map with the same tokenizer and as many
processes. Both are first seen to make as many tokens.

inference: a model of a config, its weights random, written in the form for our own inference and in that of Hugging
Face, each loaded on the CPU by a process of its own: what it then holds and, for information, how fast it is. The two
are seen to give the same logits.

gemm, block, step, decode, refresh: the 2:4 kernels of a GPU, or with small sizes the reference on the CPU. The most
important cells come first; each is in --output as soon as it is done, and the same command goes on behind them. It
refuses results of another card, version or commit. A cell that cannot be measured is in the results with its reason,
and is tried again with --again alone. choices.json beside --output has what was chosen for each product, for all five.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import benchmark_tables as tables
import checkpoint_rivals
import gpu_benchmarks
import torch
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from slope_dist.benchmark import inference, layer, loading, machine, memory, preparing, ranks, traffic
from slope_dist.benchmark.cells import CellFailedError
from slope_dist.benchmark.timing import WrongResultError
from slope_dist.command_line import EXIT_INTERRUPTED, Parser, path_argument
from slope_dist.config import load_config
from slope_dist.errors import EXIT_BAD_INPUT, UserError
from slope_dist.export.options import DTYPES

EXIT_WRONG_RESULT = 1
TABLE_WIDTH = 120


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: an option is unknown, malformed, out of range, or asks for what this machine does not have.
    """
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    options = commands.add_parser("layer", help="one linear layer, forward and backward")
    options.set_defaults(check=_check_layer, run=run_layer)
    options.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048], metavar="N", help="%(default)s")
    options.add_argument(
        "--projections",
        type=int,
        nargs="*",
        default=[512, 1024],
        metavar="N",
        help="also from width N to 4 N and back (%(default)s)",
    )
    options.add_argument("--tokens", type=int, default=2048, metavar="N", help="rows of the input (%(default)s)")
    options.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=["fp32", "bf16"], help="%(default)s")
    options.add_argument("--threads", type=int, metavar="N", help="threads of the CPU path (torch's own choice)")
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="%(default)s")
    options.add_argument("--seconds", type=float, default=2.0, metavar="S", help="timing of one row (%(default)s)")
    _add_output(options)
    options = commands.add_parser("traffic", help="bytes of a block through the data-parallel group")
    options.set_defaults(check=_check_traffic, run=run_traffic)
    options.add_argument(
        "--engines", nargs="+", choices=traffic.ENGINES, default=list(traffic.ENGINES), help="ZeRO stages, FSDP2 (all)"
    )
    options.add_argument(
        "--gradient-dtypes",
        nargs="+",
        choices=traffic.GRADIENT_DTYPES,
        default=list(traffic.GRADIENT_DTYPES),
        help="parallel.gradient_dtype (%(default)s)",
    )
    sizes = traffic.Size()
    options.add_argument("--hidden", type=int, default=sizes.hidden_size, metavar="N", help="width (%(default)s)")
    options.add_argument("--ffn", type=int, default=sizes.ffn_size, metavar="N", help="inner width (%(default)s)")
    _add_output(options)
    options = commands.add_parser("checkpoint", help="saves and loads beside torch's and DeepSpeed's")
    options.set_defaults(check=_check_checkpoint, run=run_checkpoint)
    model = checkpoint_rivals.Size()
    options.add_argument("--hidden", type=int, default=model.hidden_size, metavar="N", help="width (%(default)s)")
    options.add_argument("--layers", type=int, default=model.num_layers, metavar="N", help="blocks (%(default)s)")
    options.add_argument(
        "--stages",
        type=int,
        nargs="+",
        choices=checkpoint_rivals.STAGES,
        default=list(checkpoint_rivals.STAGES),
        help="ZeRO stages (%(default)s)",
    )
    options.add_argument("--rounds", type=int, default=5, metavar="N", help="saves and loads of each (%(default)s)")
    options.add_argument(
        "--folder", type=path_argument, metavar="DIR", help="where to write (the system's temporary folder)"
    )
    _add_output(options)
    options = commands.add_parser("loader", help="batches read from a corpus, beside Megatron-core's")
    options.set_defaults(check=_check_loader, run=run_loader)
    read = loading.Size()
    options.add_argument("--samples", type=int, default=read.samples, metavar="N", help="in the corpus (%(default)s)")
    options.add_argument("--length", type=int, default=read.sequence_length, metavar="N", help="tokens (%(default)s)")
    options.add_argument("--batch", type=int, default=read.batch_size, metavar="N", help="samples (%(default)s)")
    options.add_argument("--seconds", type=float, default=10.0, metavar="S", help="of timing (%(default)s)")
    options.add_argument(
        "--folder", type=path_argument, metavar="DIR", help="where to write (the system's temporary folder)"
    )
    _add_output(options)
    options = commands.add_parser("data", help="text to tokens, beside datasets.map")
    options.set_defaults(check=_check_data, run=run_data)
    options.add_argument("--megabytes", type=float, default=80.0, metavar="N", help="of text (%(default)s)")
    options.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes of each (%(default)s)"
    )
    options.add_argument(
        "--tokenizers", nargs="+", choices=preparing.KINDS, default=list(preparing.KINDS), help="kinds (%(default)s)"
    )
    options.add_argument("--rounds", type=int, default=5, metavar="N", help="runs of each (%(default)s)")
    _add_output(options)
    options = commands.add_parser("inference", help="memory of a loaded model, compressed beside dense")
    options.set_defaults(check=_check_inference, run=run_inference)
    options.add_argument("--config", required=True, metavar="FILE", help="of a run")
    options.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="%(default)s")
    use = inference.Work()
    options.add_argument("--prompt", type=int, default=use.prompt, metavar="N", help="tokens (%(default)s)")
    options.add_argument("--seconds", type=float, default=use.seconds, metavar="S", help="timing of each (%(default)s)")
    options.add_argument("--threads", type=int, metavar="N", help="threads of the CPU path (torch's own choice)")
    options.add_argument(
        "--folder", type=path_argument, metavar="DIR", help="where to write (the system's temporary folder)"
    )
    _add_output(options)
    gpu_benchmarks.add_commands(commands, _add_output)
    chosen = parser.parse_args(arguments)
    _check(chosen)
    return chosen


def _add_output(options: argparse.ArgumentParser) -> None:
    options.add_argument("--output", type=path_argument, metavar="FILE", help="write every number as JSON")


def _check(options: argparse.Namespace) -> None:
    options.check(options)
    # Before the minutes of measuring, not after.
    if options.output is not None:
        _check_output(options.output)


def _check_traffic(options: argparse.Namespace) -> None:
    _check_width("hidden", options.hidden)
    _check_width("ffn", options.ffn)


def _check_checkpoint(options: argparse.Namespace) -> None:
    _check_width("hidden", options.hidden)
    for name in ("layers", "rounds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} is less than 1")
    size = checkpoint_rivals.Size(hidden_size=options.hidden, num_layers=options.layers)
    try:
        size.config("2:4", 1)
    except ValidationError as error:
        raise UserError(f"--hidden {options.hidden} --layers {options.layers}: {error.errors()[0]['msg']}") from error
    _check_folder(options.folder)


def _check_loader(options: argparse.Namespace) -> None:
    for name, least in (("samples", 200), ("length", 2), ("batch", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)} is less than {least}")
    _check_seconds(options.seconds)
    _check_folder(options.folder)


def _check_folder(folder: Path | None) -> None:
    if folder is not None and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise UserError(f"--folder {folder} is not a folder that can be written to")


def _check_data(options: argparse.Namespace) -> None:
    for name in ("workers", "rounds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} is less than 1")
    # A tokenizer is trained on it.
    if not 2 <= options.megabytes <= 10_000:
        raise UserError(f"--megabytes {options.megabytes} is not between 2 and 10000")


def _check_inference(options: argparse.Namespace) -> None:
    if not memory.can_measure(torch.device("cpu")):
        raise UserError("this system does not tell a process what memory it holds; use Linux")
    # Kept: a config is read and checked once.
    options.run_config = load_config(options.config)
    length = options.run_config.model.sequence_length
    if not 1 <= options.prompt < length:
        raise UserError(f"--prompt {options.prompt} is not between 1 and {length - 1}, the model's length less one")
    if options.threads is not None and options.threads < 1:
        raise UserError(f"--threads {options.threads} is less than 1")
    _check_seconds(options.seconds)
    _check_folder(options.folder)


def _check_width(name: str, width: int) -> None:
    if width < 8 or width % 8:
        raise UserError(f"--{name} {width} is not a positive multiple of 8")


def _check_layer(options: argparse.Namespace) -> None:
    for name in ("widths", "projections"):
        for width in getattr(options, name):
            _check_width(name, width)
    for name in ("tokens", "threads"):
        number = getattr(options, name)
        if number is not None and number < 1:
            raise UserError(f"--{name} {number} is less than 1")
    _check_seconds(options.seconds)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no CUDA device; leave the option out")


def _check_seconds(seconds: float) -> None:
    if not 0 <= seconds < float("inf"):
        raise UserError(f"--seconds {seconds} is not a time of 0 or more")


def _check_output(path: Path) -> None:
    try:
        if not path.parent.is_dir():
            raise UserError(f"--output {path}: there is no folder {path.parent}")
        if path.is_dir():
            raise UserError(f"--output {path} is a folder; name a file in it")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UserError(f"--output {path} cannot be written: permission denied")
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror or error}") from error


def run_layer(options: argparse.Namespace) -> None:
    """Measure every case, print the table and write the numbers."""
    device = torch.device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    facts = machine.describe(device)
    dtypes = [DTYPES[name] for name in options.dtypes]
    cases = list(layer.cases(options.widths, options.projections, options.tokens, dtypes, device))
    rows = []
    with Console(stderr=True).status("") as status:
        # All of memory first: it forks, which must come before this process has used several threads.
        peaks = []
        for case in cases:
            status.update(f"memory: {case}")
            peaks.append(layer.measure_memory(case))
        for case, peak in zip(cases, peaks, strict=True):
            status.update(f"time: {case}")
            rivals: dict[str, dict[str, float]] = layer.measure_time(case, options.seconds)
            for name, most in peak.items():
                rivals[name]["peak_bytes"] = most
            rows.append(case.row() | {"rivals": rivals})
    _report("layer", rows, facts, tables.layer_table(rows, facts), options.output)


def run_traffic(options: argparse.Namespace) -> None:
    """Count every case on two ranks, print the table and write the numbers."""
    size = traffic.Size(hidden_size=options.hidden, ffn_size=options.ffn)
    cases = traffic.cases(options.engines, options.gradient_dtypes)
    facts = machine.describe(torch.device("cpu")) | {"deepspeed": version("deepspeed")}
    with Console(stderr=True).status(f"{len(cases)} cases on {traffic.RANKS} ranks"):
        rows = traffic.measure(cases, size)
    _report("traffic", rows, facts, tables.traffic_table(rows, size, facts), options.output)


def run_checkpoint(options: argparse.Namespace) -> None:
    """Measure every state on two ranks, print the table and write the numbers."""
    size = checkpoint_rivals.Size(hidden_size=options.hidden, num_layers=options.layers)
    facts = machine.describe(torch.device("cpu")) | {"deepspeed": version("deepspeed")}
    with Console(stderr=True).status(f"{checkpoint_rivals.RANKS} ranks save and load"):
        rows = checkpoint_rivals.measure(size, options.stages, options.rounds, options.folder)
    _report("checkpoint", rows, facts, tables.checkpoint_table(rows, facts), options.output)


def run_loader(options: argparse.Namespace) -> None:
    """Measure both readers, print the table and write the numbers."""
    size = loading.Size(samples=options.samples, sequence_length=options.length, batch_size=options.batch)
    facts = machine.describe(torch.device("cpu")) | {"megatron-core": version("megatron-core")}
    with Console(stderr=True).status(f"{size.samples} samples"):
        row = loading.measure(size, options.seconds, options.folder)
    _report("loader", [row], facts, tables.loader_table(row, facts), options.output)


def run_data(options: argparse.Namespace) -> None:
    """Measure both rivals with each tokenizer, print the table and write the numbers."""
    libraries = ("datasets", "tokenizers", "sentencepiece")
    facts = machine.describe(torch.device("cpu")) | {name: version(name) for name in libraries}
    with Console(stderr=True).status(f"{options.megabytes:g} MB on {options.workers} processes"):
        rows = preparing.measure(options.megabytes, options.workers, options.rounds, options.tokenizers)
    _report("data", rows, facts, tables.data_table(rows, facts), options.output)


def run_inference(options: argparse.Namespace) -> None:
    """Write, load and measure both forms, print the table and write the numbers."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    facts = machine.describe(torch.device("cpu"))
    work = inference.Work(prompt=options.prompt, seconds=options.seconds)
    with Console(stderr=True).status("") as status:
        row = inference.measure(options.run_config, DTYPES[options.dtype], work, options.folder, status.update)
    row = {"config": Path(options.config).stem} | row
    _report("inference", [row], facts, tables.inference_table(row, facts), options.output)


def _report(name: str, rows: list[dict], facts: dict[str, object], table: Table, output: Path | None) -> None:
    console = Console()
    # A file or a pipe has no width; a table cut to 80 columns says nothing.
    console = console if console.is_terminal else Console(width=TABLE_WIDTH)
    console.print(table)
    if output is None:
        return
    # Whole or not at all: what a full disk cuts short must not take the place of earlier results.
    partial = output.with_name(f".{output.name}.partial")
    try:
        partial.write_text(json.dumps({"benchmark": name, "machine": facts, "rows": rows}, indent=1) + "\n")
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror or error}") from error
    console.print(f"every number is in {output}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        options = parse(arguments)
        options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except ranks.RankFailedError as error:
        # A rank has failed, on a full disk for one; the text ends in its own words.
        print(f"not measured: {error}", file=sys.stderr)
        return EXIT_WRONG_RESULT
    except CellFailedError as error:
        print(f"not measured: {error}", file=sys.stderr)
        return EXIT_WRONG_RESULT
    except WrongResultError as error:
        print(f"wrong result, nothing was timed: {error}", file=sys.stderr)
        return EXIT_WRONG_RESULT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
