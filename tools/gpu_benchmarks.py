"""The commands of tools/benchmark.py that are for GPUs: their options, their cells, and what is made of the results."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gpu_tables as tables
import torch
from rich.console import Console

from slope_dist.benchmark import block, cells, decode, gemm, machine, plots, refresh, step
from slope_dist.benchmark.block_linears import config_name, matrices
from slope_dist.benchmark.cells import Cell
from slope_dist.benchmark.peaks import peaks_on
from slope_dist.benchmark.results import ResultFile
from slope_dist.benchmark.timing import WrongResultError
from slope_dist.command_line import path_argument
from slope_dist.config import Config, load_config
from slope_dist.errors import UserError
from slope_dist.export.options import DTYPES
from slope_dist.sparse import kernels
from slope_dist.sparse.kernels.vendors import NAMES

MODELS = ("opt66b", "opt30b", "opt13b", "opt6.7b", "opt2.7b", "llama3-8b", "mistral-7b")
TRAINED_TOKENS = 8192
OTHER_WIDTHS = (4096, 5120)
"""Hidden sizes of the models behind the largest: time may end before the others."""

TENSOR_RANKS = (1, 2, 4, 8)

CPU_TOKENS = 512
"""A default that ends on a CPU."""

CHOICES = "choices.json"
"""Beside --output: which kernels were chosen, by card and versions."""

ARRANGEMENTS = {"in-place": "in place", "kept": "kept", "derived": "derived"}

Dispatcher = kernels.Dispatcher | None
Cells = Callable[[argparse.Namespace, Dispatcher], Iterator[Cell]]


def add_commands(commands: Any, add_output: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add gemm, block, step, decode and refresh to the parser's commands."""
    options = _command(commands, "gemm", "products of the models' weights", gemm_cells, add_output)
    options.add_argument("--tokens", type=int, nargs="+", metavar="N", help=f"{gemm.TOKENS}; on the CPU up to 512")
    options.add_argument("--tensor", type=int, nargs="+", metavar="N", help="tensor ranks (1 2 4 8; on the CPU 1)")
    for name, what, made in (
        ("block", "a training step of one transformer block", block_cells),
        ("step", "a training step of a whole model", step_cells),
        ("refresh", "transposes and column masks as a share of a block's step", refresh_cells),
    ):
        options = _command(commands, name, what, made, add_output)
        options.add_argument(
            "--tokens", type=int, nargs="+", metavar="N", help=f"of a micro-batch ({TRAINED_TOKENS}; CPU {CPU_TOKENS})"
        )
        if name == "step":
            _add_layers(options)
    options = _command(
        commands, "decode", "prompts read and tokens written by a model in memory", decode_cells, add_output
    )
    options.add_argument("--prompt", type=int, metavar="N", help="tokens of a prompt (1024, or what the model takes)")
    options.add_argument("--prefill", type=int, metavar="N", help=f"tokens of all prompts ({TRAINED_TOKENS})")
    options.add_argument(
        "--batches", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="sequences written (%(default)s)"
    )
    _add_layers(options)


def _command(
    commands: Any, name: str, what: str, made: Cells, add_output: Callable[[argparse.ArgumentParser], None]
) -> argparse.ArgumentParser:
    options = commands.add_parser(name, help=what)
    options.set_defaults(check=check, run=partial(run, name, made))
    options.add_argument(
        "--configs", nargs="+", metavar="FILE", help=f"of runs (configs/ of {', '.join(MODELS)}; on the CPU tiny)"
    )
    options.add_argument("--device", choices=["cpu", "cuda"], help="cuda where there is one")
    options.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="%(default)s")
    options.add_argument("--minutes", type=float, metavar="N", help="begin no cell that would end later (no limit)")
    options.add_argument("--seconds", type=float, default=2.0, metavar="S", help="timing of one cell (%(default)s)")
    options.add_argument("--threads", type=int, metavar="N", help="threads of the CPU path (torch's own choice)")
    options.add_argument("--vendors", nargs="*", choices=NAMES, default=list(NAMES), help="libraries (%(default)s)")
    options.add_argument(
        "--arrangement",
        choices=ARRANGEMENTS,
        default="kept" if name in ("block", "step", "refresh") else "in-place",
        help="how a vendor's library comes by a weight: in its own buffer, by metadata kept beside it, as engines need "
        "it, or by metadata made for each product (%(default)s)",
    )
    add_output(options)
    options.add_argument("--plot", type=path_argument, metavar="FILE", help="draw a PNG (beside --output)")
    options.add_argument("--fresh", action="store_true", help="replace the results that --output holds")
    options.add_argument("--again", action="store_true", help="try again what could not be measured")
    return options


def _add_layers(options: argparse.ArgumentParser) -> None:
    options.add_argument("--layers", type=int, metavar="N", help="blocks of the model (as many as fit)")


def check(options: argparse.Namespace) -> None:
    """Refuse what cannot be measured, and fill in what depends on the device.

    Raises:
        UserError: naming the option.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no CUDA device; leave the option out to see the CPU's numbers")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("tokens", "tensor", "batches", "threads", "prompt", "prefill", "layers"):
        given = getattr(options, name, None)
        for number in given if isinstance(given, list) else [given]:
            if number is not None and number < 1:
                raise UserError(f"--{name} {number} is less than 1")
    if options.minutes is not None and not 0 <= options.minutes < float("inf"):
        raise UserError(f"--minutes {options.minutes} is not a time of 0 or more")
    if not 0 <= options.seconds < float("inf"):
        raise UserError(f"--seconds {options.seconds} is not a time of 0 or more")
    paths = options.configs or [machine.ROOT / "configs" / f"{name}.json" for name in _default_models(options)]
    # Kept: a config is read and checked once.
    loaded = [(config_name(path), load_config(path)) for path in paths]
    options.loaded = sorted(loaded, key=lambda pair: -pair[1].model.block_size)
    if options.plot is None and options.output is not None:
        options.plot = options.output.with_suffix(".png")
    if options.plot is not None and not os.path.isdir(options.plot.parent):
        raise UserError(f"--plot {options.plot}: there is no folder {options.plot.parent}")
    if options.command == "gemm":
        options.tensor = options.tensor or (TENSOR_RANKS if options.device == "cuda" else (1,))
    if options.command == "decode" and options.prefill is None:
        options.prefill = TRAINED_TOKENS if options.device == "cuda" else CPU_TOKENS


def _default_models(options: argparse.Namespace) -> tuple[str, ...]:
    return MODELS if options.device == "cuda" else ("tiny",)


def run(name: str, made: Cells, options: argparse.Namespace) -> None:
    """Measure the cells that are not in the results yet, print the table and draw the picture.

    Raises:
        UserError: the results were measured in another setting.
        WrongResultError: a sparse rival of a cell is wrong; the others are measured, and in the table.
        CellFailedError: a cell ended with an unforeseen error, which is in the table too.
    """
    device = _device(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    facts = machine.describe(device)
    dispatcher = _dispatcher(options, device)
    if dispatcher is not None:
        facts |= {
            "vendors": dispatcher.vendors.versions,
            "without": dispatcher.vendors.missing,
            "arrangement": dispatcher.arrangement,
        }
    # All of them before the first is measured: what cannot be is said at once.
    planned = [Cell(cell.key, partial(_with_state, cell, device)) for cell in made(options, dispatcher)]
    file = ResultFile(options.output, name, facts, fresh=options.fresh)
    with Console(stderr=True).status("") as status, kernels.using(dispatcher):
        outcome = cells.run(
            planned, file, options.minutes, lambda key: status.update(f"{name}: {key}"), again=options.again
        )
    console = Console()
    # A file or a pipe has no width; a table cut to 80 columns says nothing.
    console = console if console.is_terminal else Console(width=tables.WIDTH)
    if file.rows:
        console.print(tables.TABLES[name](file.rows, file.facts))
    if options.plot is not None and file.rows:
        plots.draw(name, file.rows, file.facts, options.plot)
    console.print(f"{outcome}" + (f"; every number is in {file.path}" if file.path and file.rows else ""))
    if outcome.wrong:
        raise WrongResultError("; ".join(outcome.wrong))
    if outcome.failed:
        end = "; the GPU takes no more calls of this process: start the command again" if outcome.unusable else ""
        raise cells.CellFailedError(f"{len(outcome.failed)} cells, the first: {outcome.failed[0]}{end}")


def _with_state(cell: Cell, device: torch.device) -> dict[str, Any]:
    """The cell's row, and how the card was when it had just been measured."""
    return cell.measure() | {"card_then": machine.state_of_card(device)}


def _dispatcher(options: argparse.Namespace, device: torch.device) -> Dispatcher:
    """What chooses the kernels of a GPU; on the CPU there is nothing to choose."""
    if device.type != "cuda":
        return None
    store = None
    if options.output is not None:
        # One for all results of a folder: what gemm has searched, block and step need not.
        store = kernels.ChoiceStore(options.output.with_name(CHOICES))
    vendors = kernels.find_vendors(device, options.vendors)
    return kernels.Dispatcher(device, vendors, store, arrangement=ARRANGEMENTS[options.arrangement])  # type: ignore[arg-type]


def _device(options: argparse.Namespace) -> torch.device:
    # With its index, which tensors on it have too.
    return torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")


def gemm_cells(options: argparse.Namespace, dispatcher: Dispatcher) -> Iterator[Cell]:
    """Both products of every weight of the models."""
    device = _device(options)
    tokens = options.tokens or [count for count in gemm.TOKENS if device.type == "cuda" or count <= CPU_TOKENS]
    dtype = DTYPES[options.dtype]
    peaks = peaks_on(device, dtype)
    for case in gemm.cases(matrices(options.loaded, options.tensor), tokens, dtype, device):
        yield Cell(str(case), partial(gemm.measure, case, dispatcher, options.seconds, peaks))


def _trained(options: argparse.Namespace) -> Iterator[tuple[str, Config, int]]:
    """Models, those with a goal first, with the tokens of a micro-batch."""
    fallback = TRAINED_TOKENS if options.device == "cuda" else CPU_TOKENS
    for tokens in options.tokens or [fallback]:
        for name, config in _ordered(options.loaded):
            block.batch_of(config, tokens)
            yield name, config, tokens


def _ordered(loaded: list[tuple[str, Config]]) -> list[tuple[str, Config]]:
    """The largest model first, then of each other width that a goal is set for the one with the least attention."""
    ordered = loaded[:1]
    for width in OTHER_WIDTHS:
        of_width = [pair for pair in loaded[1:] if pair[1].model.hidden_size == width]
        ordered += sorted(of_width, key=lambda pair: pair[1].model.sequence_length)[:1]
    return ordered + [pair for pair in loaded if pair not in ordered]


def block_cells(options: argparse.Namespace, dispatcher: Dispatcher) -> Iterator[Cell]:
    """One block of every model."""
    for name, config, tokens in _trained(options):
        work = partial(block.measure, name, config, tokens, _device(options), DTYPES[options.dtype], options.seconds)
        yield Cell(f"{name}, {tokens} tokens, {options.dtype}", work)


def refresh_cells(options: argparse.Namespace, dispatcher: Dispatcher) -> Iterator[Cell]:
    """One block of every model."""
    for name, config, tokens in _trained(options):
        work = partial(refresh.measure, name, config, tokens, _device(options), DTYPES[options.dtype], options.seconds)
        yield Cell(f"{name}, {tokens} tokens, {options.dtype}", work)


def step_cells(options: argparse.Namespace, dispatcher: Dispatcher) -> Iterator[Cell]:
    """Every model."""
    layers = options.layers
    for name, config, tokens in _trained(options):
        which = "layers that fit" if layers is None else f"{layers} layers"
        arguments = (name, config, tokens, _device(options), DTYPES[options.dtype], options.seconds, layers)
        yield Cell(f"{name}, {which}, {tokens} tokens, {options.dtype}", partial(step.measure, *arguments))


def decode_cells(options: argparse.Namespace, dispatcher: Dispatcher) -> Iterator[Cell]:
    """Every model without adapters, then with those of each rank."""
    layers = options.layers
    for share in decode.RANKS:
        for name, config in _ordered(options.loaded):
            # One more is written behind a prompt.
            prompt = options.prompt or min(1024, config.model.sequence_length - 1)
            if prompt >= config.model.sequence_length:
                raise UserError(f"--prompt {prompt} is not below {config.model.sequence_length}, the length of {name}")
            work = decode.Work(prompt=prompt, prefill=options.prefill, batches=options.batches)
            arguments = (name, config, share, work, _device(options), DTYPES[options.dtype], options.seconds, layers)
            which = "layers that fit" if layers is None else f"{layers} layers"
            uses = f"prompt {prompt}, prefill {options.prefill}, batches {options.batches}"
            key = f"{name}, {which}, adapters {100 * share:g} %, {uses}, {options.dtype}"
            yield Cell(key, partial(decode.measure, *arguments))
