"""Perplexity and bits per byte of a text under a model.

    python tools/evaluate.py runs/tiny --corpus data/python-stdlib
    python tools/evaluate.py converted/ --corpus data/mine --split train --limit 100000 --json
    python tools/evaluate.py runs/tiny book.txt more.jsonl.zst --context 128 --stride 64

MODEL is a checkpoint, a run folder (its newest checkpoint that verifies), or a folder that
tools/convert_checkpoint.py wrote.

The text is one split of a corpus that tools/prepare_data.py made (or what the names of a .bin and an .idx file of
Megatron-LM's preprocessing begin with), or files as that program takes them: a .txt file is one document, of .jsonl and
.parquet each row is one.

Each token is predicted once, from at least context - stride tokens before it where there are so many. With the stride
that is the default, equal to the context, the result on a run's validation split is that of the run's own evaluation,
which counts whole samples: the last tokens of a corpus, too few for one, are left out. A document is predicted from
its first token on, after the id that ends a document; that of its own end is not counted.

Loss is the mean over tokens, in nats; perplexity is exp(loss). Bits per byte can be compared between tokenizers.

exit codes:
  0    done, or whoever read the output has left
  2    the command line is wrong, the model, its tokenizer or the text cannot be used, or the output has no room
  130  interrupted
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from slope_dist.command_line import Parser, answer
from slope_dist.config.data import DataConfig
from slope_dist.data.corpus import Corpus
from slope_dist.data.readers import Document
from slope_dist.data.sources import text_files
from slope_dist.errors import UserError
from slope_dist.export.options import DTYPES
from slope_dist.inference.command_line import add_model_options, model_of, say
from slope_dist.inference.evaluation import Evaluation, View, check_tokenizer, evaluate_corpus, evaluate_documents
from slope_dist.inference.model import InferenceModel
from slope_dist.output import visible
from slope_dist.transfer import Transfer, count_text

NAMED = 3
"""So many texts are named in the result; a pattern may stand for thousands."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: an option is unknown, missing or contradicts another.
    """
    parser = Parser(__doc__)
    add_model_options(parser)
    parser.add_argument("text", nargs="*", metavar="TEXT_FILE", help="file of text, folder of them, or glob pattern")
    parser.add_argument("--corpus", metavar="FOLDER", help="a prepared corpus, instead of TEXT_FILE")
    parser.add_argument("--split", choices=("train", "valid"), help="of the corpus (valid)")
    parser.add_argument(
        "--valid-fraction", type=float, metavar="F", help="of a corpus of Megatron-LM's, as in the run (0.02)"
    )
    parser.add_argument("--field", help="field or column that holds the text of rows (text)")
    parser.add_argument("--context", type=int, metavar="N", help="most tokens that the model sees (as in training)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens from one window to the next (the context)")
    parser.add_argument("--batch", type=int, metavar="N", help=f"windows at a time ({View.batch})")
    parser.add_argument("--limit", type=int, metavar="TOKENS", help="predict the first tokens only")
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    # Files may come behind options, too.
    options = parser.parse_intermixed_args(arguments)
    if (options.corpus is None) == (not options.text):
        parser.error("give --corpus or TEXT_FILE, one of the two")
    if options.text and (options.split is not None or options.valid_fraction is not None):
        parser.error("--split and --valid-fraction are for --corpus")
    if options.corpus is not None and options.field is not None:
        parser.error("--field is for TEXT_FILE")
    if options.valid_fraction is not None and not 0 < options.valid_fraction < 1:
        parser.error(f"--valid-fraction {options.valid_fraction} is not between 0 and 1")
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit {options.limit} is less than 1")
    return options


def run(options: argparse.Namespace) -> None:
    """Evaluate, and print the result with what it depends on."""
    source = text_files(options.text, options.field or "text") if options.text else None
    model = model_of(options)
    view = View.of(model, options.context, options.stride, options.batch)
    facts: dict[str, Any] = {"model": str(model.stored.origin.path), "form": model.stored.origin.form}
    if model.stored.origin.step is not None:
        facts["step"] = model.stored.origin.step
    if source is not None:
        transfer = Transfer("read", say)
        transfer.begin(source.num_bytes)
        result = evaluate_documents(model, _told(source.documents(), transfer), view, limit=options.limit)
        facts["text"] = options.text
    else:
        corpus = _corpus(options, model)
        transfer = Transfer("tokens predicted", say, text=count_text)
        result = evaluate_corpus(model, corpus, view, limit=options.limit, transfer=transfer)
        facts |= {"corpus": options.corpus, "split": corpus.split, "left_out": corpus.num_tokens - 1 - result.tokens}
    dtype = next((name for name, dtype in DTYPES.items() if dtype == model.dtype), str(model.dtype))
    facts |= {"context": view.context, "stride": view.stride, "dtype": dtype, "device": str(model.device)}
    print(_json(facts, result) if options.json else _text(facts, result))


def _corpus(options: argparse.Namespace, model: InferenceModel) -> Corpus:
    default = DataConfig.model_fields["valid_fraction"].default
    corpus = Corpus.open(
        options.corpus,
        options.split or "valid",
        model.vocab_size,
        valid_fraction=default if options.valid_fraction is None else options.valid_fraction,
        tokenizer=None if options.tokenizer is None else str(options.tokenizer),
    )
    if options.valid_fraction is not None and corpus.path.parent == corpus.folder:
        raise UserError(f"--valid-fraction does not apply: {options.corpus} is split already; leave it out")
    if corpus.tokenizer is None:
        say(f"note: {options.corpus} has no tokenizer; its ids are taken for the model's, and bytes are not known")
    else:
        check_tokenizer(model.tokenizer, corpus)
    return corpus


def _told(documents: Iterator[tuple[Document, int]], transfer: Transfer) -> Iterator[Document]:
    for document, size in documents:
        yield document
        transfer.add(size)


def _text(facts: dict[str, Any], result: Evaluation) -> str:
    if "corpus" in facts:
        where = f"{facts['corpus']}, {facts['split']} split"
    else:
        given = facts["text"]
        where = " ".join(given[:NAMED]) + (f" and {len(given) - NAMED} more" if len(given) > NAMED else "")
    size = f"{result.tokens:,} tokens"
    if result.text_bytes is not None:
        size += f", {result.text_bytes:,} bytes"
    if facts.get("left_out"):
        size += f" ({facts['left_out']:,} tokens behind them left out)"
    step = f" after step {facts['step']}" if "step" in facts else ""
    return "\n".join(
        (
            f"{result}",
            f"model: {visible(facts['model'])}{step}, {facts['dtype']} on {facts['device']}",
            f"text: {visible(where)}: {size}",
            f"context {facts['context']}, stride {facts['stride']}",
        )
    )


def _json(facts: dict[str, Any], result: Evaluation) -> str:
    numbers = {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "bytes": result.text_bytes,
    }
    return json.dumps(facts | numbers, indent=2)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return answer(lambda: run(parse(arguments)))


if __name__ == "__main__":
    # Names of files may hold characters that the terminal's encoding does not have.
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
