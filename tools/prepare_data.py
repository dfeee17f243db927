"""Text and jsonl files to a corpus that launch/pretrain.py reads.

    python tools/prepare_data.py texts/ more.jsonl --output data/mine --vocab-size 32000
    python tools/prepare_data.py --source python-stdlib --output data/python-stdlib

A .txt file is one document; of a .jsonl file each line is one, its text under --field. The folder has the tokens in
Megatron-core's format (train and valid), the tokenizer and a manifest, and appears whole or not at all.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from slope_dist.command_line import EXIT_INTERRUPTED, Parser
from slope_dist.config.schema import DataConfig, RunConfig
from slope_dist.data.prepare import prepare
from slope_dist.data.sources import EMBEDDED, embedded_source, text_files
from slope_dist.errors import EXIT_BAD_INPUT, UserError

DEFAULT_VOCAB_SIZE = 4096


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: an option is unknown, missing, malformed or contradicts another.
    """
    parser = Parser(__doc__)
    parser.add_argument("input", nargs="*", help=".txt or .jsonl file, folder of them, or glob pattern")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to make; must not exist")
    parser.add_argument("--source", choices=sorted(EMBEDDED), help="text that this machine has, instead of INPUT")
    parser.add_argument("--field", default="text", help="field of a jsonl row that holds the text (%(default)s)")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument("--tokenizer", type=Path, metavar="MODEL", help="SentencePiece model to use")
    tokenizer.add_argument(
        "--vocab-size", type=int, metavar="N", help=f"pieces of a tokenizer to train ({DEFAULT_VOCAB_SIZE})"
    )
    parser.add_argument(
        "--valid-fraction",
        type=float,
        default=DataConfig.model_fields["valid_fraction"].default,
        metavar="F",
        help="share of the documents for validation (%(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=RunConfig.model_fields["seed"].default,
        help="decides which documents are for validation (%(default)s)",
    )
    options = parser.parse_args(arguments)
    if bool(options.input) == bool(options.source):
        parser.error("give INPUT or --source, one of the two")
    return options


def run(options: argparse.Namespace) -> None:
    """Prepare the corpus and print what it holds."""
    source = embedded_source(options.source) if options.source else text_files(options.input, options.field)
    vocab_size = options.vocab_size
    if vocab_size is None and options.tokenizer is None:
        vocab_size = DEFAULT_VOCAB_SIZE
    manifest = prepare(
        source,
        options.output,
        vocab_size=vocab_size,
        valid_fraction=options.valid_fraction,
        seed=options.seed,
        tokenizer=options.tokenizer,
    )
    for split, entry in manifest["splits"].items():
        print(
            f"{split}: {entry['documents']} documents, {entry['tokens']} tokens, "
            f"{entry['text_bytes'] / entry['tokens']:.2f} bytes a token"
        )
    print(f"corpus of {manifest['vocab_size']} ids in {options.output}; set data.folder to it")


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        run(parse(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted: no corpus was written", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
