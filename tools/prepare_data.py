"""Text to a corpus that launch/pretrain.py reads.

    python tools/prepare_data.py texts/ more.jsonl.zst rows.parquet --output data/mine --vocab-size 32000
    python tools/prepare_data.py texts/ --output data/gpt2 --tokenizer gpt2/
    python tools/prepare_data.py --dataset wikitext:wikitext-103-raw-v1 --output data/wikitext
    python tools/prepare_data.py --source python-stdlib --output data/python-stdlib

A .txt file is one document; of .jsonl and .parquet each row is one, its text under --field; .gz and .zst are read as
they are. --dataset takes what Hugging Face `datasets` loads by name, or a folder it saved.

--tokenizer takes a SentencePiece model, a tokenizer.json, or a folder that holds tokenizer.json, tokenizer.model, or
GPT-2's vocab.json and merges.txt. One that cannot give every text back is refused. The token that ends a document is
the one that tokenizer_config.json beside it names, or a known one such as <|endoftext|>; else name it.

The output has the tokens in Megatron-core's format (train and valid), the tokenizer, and a manifest with the SHA-256 of
them and of every input file; it is the same bytes with any number of workers, and appears whole or not at all. What was
interrupted, by Ctrl-C, a kill or a full disk, lies in DIR.partial, and the same command goes on with it: it reads the
text that was done once more, to compare it, and does not encode it again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from slope_dist.command_line import EXIT_INTERRUPTED, Parser, answer, path_argument
from slope_dist.config.schema import DataConfig, RunConfig
from slope_dist.data.prepare import prepare
from slope_dist.data.sources import EMBEDDED, Source, dataset, embedded_source, text_files
from slope_dist.errors import EXIT_BAD_INPUT, UserError
from slope_dist.output import visible

DEFAULT_VOCAB_SIZE = 4096


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: an option is unknown, missing, malformed or contradicts another.
    """
    parser = Parser(__doc__)
    parser.add_argument("input", nargs="*", help="file of text, folder of them, or glob pattern")
    parser.add_argument(
        "--output", required=True, type=path_argument, metavar="DIR", help="folder to make; must not exist"
    )
    parser.add_argument("--source", choices=sorted(EMBEDDED), help="text that this machine has, instead of INPUT")
    parser.add_argument("--dataset", metavar="NAME[:CONFIG]", help="what `datasets` loads, instead of INPUT")
    parser.add_argument("--split", default="train", help="split of the dataset (%(default)s)")
    parser.add_argument("--stream", action="store_true", help="read the dataset without storing it first")
    parser.add_argument("--field", default="text", help="field or column that holds the text (%(default)s)")
    parser.add_argument(
        "--skip-bad-rows", action="store_true", help="leave out and count rows without text, instead of stopping"
    )
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument(
        "--tokenizer", type=path_argument, metavar="PATH", help="SentencePiece model, tokenizer.json, or a folder"
    )
    tokenizer.add_argument(
        "--vocab-size", type=int, metavar="N", help=f"pieces of a tokenizer to train ({DEFAULT_VOCAB_SIZE})"
    )
    parser.add_argument("--end-of-document", metavar="TOKEN", help="special token of --tokenizer that ends a document")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that read rows and encode them (the cores there are)"
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
    if sum(map(bool, (options.input, options.source, options.dataset))) != 1:
        parser.error("give INPUT, --dataset or --source, one of the three")
    if options.dataset is None and (options.stream or options.split != "train"):
        parser.error("--split and --stream are for --dataset")
    if options.source and (options.skip_bad_rows or options.field != "text"):
        parser.error("--field and --skip-bad-rows are for INPUT and --dataset")
    if options.end_of_document is not None and options.tokenizer is None:
        parser.error("--end-of-document is for --tokenizer")
    return options


def source_of(options: argparse.Namespace) -> Source:
    """The documents that the options name."""
    skip = options.skip_bad_rows
    if options.source:
        return embedded_source(options.source)
    if options.dataset:
        return dataset(options.dataset, options.split, options.field, stream=options.stream, skip_bad_rows=skip)
    return text_files(options.input, options.field, skip_bad_rows=skip)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prepare the corpus and return its manifest."""
    source = source_of(options)
    vocab_size = options.vocab_size
    if vocab_size is None and options.tokenizer is None:
        vocab_size = DEFAULT_VOCAB_SIZE
    return prepare(
        source,
        options.output,
        vocab_size=vocab_size,
        valid_fraction=options.valid_fraction,
        seed=options.seed,
        tokenizer=options.tokenizer,
        end_of_document=options.end_of_document,
        workers=options.workers,
    )


def show(manifest: dict[str, Any], output: Path) -> None:
    """Print what a corpus holds."""
    if manifest["rows_rejected"]:
        print(f"rows left out: {manifest['rows_rejected']}")
    for split, entry in manifest["splits"].items():
        print(
            f"{split}: {entry['documents']} documents, {entry['tokens']} tokens, "
            f"{entry['text_bytes'] / entry['tokens']:.2f} bytes a token"
        )
    print(f"corpus of {manifest['vocab_size']} ids in {output}; set data.folder to it")


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        options = parse(arguments)
        manifest = run(options)
    except UserError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted: no corpus was written; the same command goes on with what was done", file=sys.stderr)
        return EXIT_INTERRUPTED
    return answer(lambda: show(manifest, options.output))


if __name__ == "__main__":
    # Names of folders may hold characters that the terminal's encoding does not have.
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
