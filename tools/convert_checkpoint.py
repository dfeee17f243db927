"""A checkpoint to what others load, or a model of theirs to a checkpoint that training goes on from.

    python tools/convert_checkpoint.py runs/tiny --to hf --output exports/tiny
    python tools/convert_checkpoint.py runs/tiny/checkpoints/step-00000160 --to slope --output exports/tiny-slope
    python tools/convert_checkpoint.py exports/tiny --from hf --to slope-checkpoint --config configs/tiny.json \\
        --merge-adapters --set run.folder=runs/continued

MODEL is a checkpoint of any layout, a run folder (then its newest checkpoint that verifies), something that this
command has written, or a model of Hugging Face. Every file of a checkpoint is hashed first. Tensors pass through
memory a layer at a time.

--to hf: Hugging Face's files: config.json, generation_config.json, tokenizer, safetensors; pruned weights with explicit
zeros. Adapters lie beside them in adapter/ for PEFT, or are added into the weights with --merge-adapters.
--to compressed: values and bit masks in the layout of compressed-tensors' sparse-24-bitmask, adapters beside them.
--to slope: for this program's own inference: weights as they are in memory.
--to slope-checkpoint: step 0 of the run that --config describes, in its run folder. Weights that are 2:4 already are
kept as they are, others are pruned by magnitude.

The output appears whole or not at all: the first three after they were read back and compared, number by number,
with what they were made of; a checkpoint with its hashes and the loss of a fixed batch, which the run that loads it
must find again. docs/inference-formats.md describes the formats.

exit codes:
  0    done
  1    what was written read back as something else, or another failure; nothing is left
  2    what you can put right
  130  interrupted; nothing is left
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys

from slope_dist.command_line import EXIT_INTERRUPTED, Parser, answer, path_argument
from slope_dist.config import load_config
from slope_dist.errors import EXIT_BAD_INPUT, UserError
from slope_dist.export.exporting import FORMS, convert
from slope_dist.export.opening import form_of, open_model
from slope_dist.export.options import DTYPES, Options, check_options
from slope_dist.export.proof import WrongExportError
from slope_dist.output import visible
from slope_dist.transfer import Transfer, size_text

CHECKPOINT = "slope-checkpoint"
EXIT_WRONG = 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: an option is unknown, missing, or has no meaning beside another.
    """
    parser = Parser(__doc__)
    parser.add_argument("model", type=path_argument, metavar="MODEL", help="checkpoint, run folder, or converted model")
    parser.add_argument("--to", required=True, choices=[*FORMS, CHECKPOINT], help="what to write")
    parser.add_argument(
        "--from", dest="source", choices=["checkpoint", *FORMS], help="what MODEL is, if it should be nothing else"
    )
    parser.add_argument("--output", type=path_argument, metavar="DIR", help="folder to make; must not exist")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the numbers written (as they are stored)")
    parser.add_argument(
        "--tokenizer", type=path_argument, metavar="PATH", help="of the model, if it is not where its run had it"
    )
    parser.add_argument("--no-tokenizer", action="store_true", help="write no tokenizer")
    adapters = parser.add_argument_group("adapters")
    adapters.add_argument(
        "--merge-adapters",
        action="store_true",
        help="hf, slope-checkpoint: add them to the weights, which are dense then",
    )
    adapters.add_argument("--pad-adapters", action="store_true", help="hf: zeros up to a rank that vLLM accepts")
    adapters.add_argument(
        "--prune-adapters", action="store_true", help="slope: make first factors 2:4, to lie in one matrix with weights"
    )
    run = parser.add_argument_group("slope-checkpoint")
    run.add_argument("--config", metavar="FILE", help="the run that is to go on from the checkpoint")
    run.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="K=V", help="as for launch/pretrain.py"
    )
    options = parser.parse_args(arguments)
    if (options.config is None) == (options.to == CHECKPOINT):
        parser.error(f"--config is for --to {CHECKPOINT}, which needs it")
    if options.changes and options.config is None:
        parser.error("--set is for --config")
    if options.to == CHECKPOINT:
        if options.output is not None:
            parser.error("the output of --to slope-checkpoint is the run folder; say it with --set run.folder=DIR")
        if options.dtype or options.no_tokenizer or options.pad_adapters or options.prune_adapters:
            parser.error("--dtype, --no-tokenizer, --pad-adapters and --prune-adapters are not for slope-checkpoint")
    elif options.output is None:
        parser.error("--output is required")
    if options.tokenizer and options.no_tokenizer:
        parser.error("--tokenizer and --no-tokenizer contradict each other")
    return options


def run(options: argparse.Namespace) -> list[str]:
    """Convert, and return what to say of it."""
    form = form_of(options.model)
    if options.source not in (None, form):
        raise UserError(f"{options.model} is not of the form {options.source}; it looks like {form}")
    if options.to == CHECKPOINT:
        return _begin_run(options)
    chosen = Options(
        dtype=DTYPES[options.dtype] if options.dtype else None,
        merge_adapters=options.merge_adapters,
        pad_adapters=options.pad_adapters,
        prune_adapters=options.prune_adapters,
        tokenizer=not options.no_tokenizer,
    )
    check_options(options.to, chosen)
    stored = open_model(options.model, options.tokenizer, _transfer("hashing files"))
    lines = convert(stored, options.to, options.output, chosen, _transfer("writing"), _transfer("reading back"))
    size = sum(path.stat().st_size for path in options.output.rglob("*") if path.is_file())
    return [*lines, f"{options.output}: {options.to}, {size_text(size)}, read back and the same"]


def _begin_run(options: argparse.Namespace) -> list[str]:
    # Of runs and corpora only this form needs to know, and loading what knows them takes seconds.
    from slope_dist.training.beginning import begin_from

    config = load_config(options.config, options.changes)
    stored = open_model(options.model, options.tokenizer, _transfer("hashing files"))
    if options.tokenizer is not None:
        # One that was named must be there; without any, a run can begin.
        stored.tokenizer()
    begun = begin_from(stored, config, merge_adapters=options.merge_adapters, transfer=_transfer("writing"))
    go_on = ["python", "launch/pretrain.py", "--config", options.config]
    for change in options.changes:
        go_on += ["--set", change]
    return [*begun.lines, f"{begun.path}: {size_text(begun.bytes)}; go on with: {shlex.join(go_on)}"]


def _transfer(what: str) -> Transfer:
    return Transfer(what, lambda line: print(line, file=sys.stderr))


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    # A scheduler's request to end must leave as little behind as Ctrl-C does.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        lines = run(parse(arguments))
    except UserError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except WrongExportError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return EXIT_WRONG
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return EXIT_INTERRUPTED
    return answer(lambda: print("\n".join(visible(line) for line in lines)))


if __name__ == "__main__":
    # Names of folders may hold characters that the terminal's encoding does not have.
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
