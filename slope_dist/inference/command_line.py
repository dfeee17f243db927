"""What the command lines that load a model have in common."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from slope_dist.command_line import path_argument
from slope_dist.errors import UserError
from slope_dist.export.opening import open_model
from slope_dist.export.options import DTYPES
from slope_dist.inference.model import InferenceModel
from slope_dist.transfer import Transfer

DEVICES = ("cpu", "cuda")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """MODEL, --tokenizer, --dtype and --device."""
    parser.add_argument(
        "model", type=path_argument, metavar="MODEL", help="folder of a checkpoint, run or converted model"
    )
    parser.add_argument(
        "--tokenizer",
        type=path_argument,
        metavar="PATH",
        help="of the model (the one with it, or where its config says)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of weights and activations (as the weights are stored)")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where to compute (%(default)s)")


def model_of(options: argparse.Namespace) -> InferenceModel:
    """Load the model that the options name.

    Raises:
        UserError: see `load`.
    """
    return load(options.model, tokenizer=options.tokenizer, dtype=options.dtype, device=options.device)


def load(path: Path, *, tokenizer: Path | None, dtype: str | None, device: str) -> InferenceModel:
    """Load a model by the names of a dtype and a device, with a line now and then on stderr.

    Raises:
        UserError: there is no such dtype or device, or the model cannot be loaded.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f'there is no dtype "{dtype}"; there are {", ".join(DTYPES)}')
    if device.partition(":")[0] not in DEVICES:
        raise UserError(f'there is no device "{device}"; there are {", ".join(DEVICES)}')
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"device {device} is not there: torch {torch.__version__} finds no GPU; use cpu")
    stored = open_model(path, tokenizer, Transfer("hashing files", say))
    wanted = None if dtype is None else DTYPES[dtype]
    return InferenceModel(stored, device=device, dtype=wanted, transfer=Transfer("loading the model", say))


def say(line: str) -> None:
    """A line on stderr."""
    print(line, file=sys.stderr, flush=True)
