"""Text that a model continues.

    python tools/generate.py runs/tiny --prompt "def main"
    python tools/generate.py runs/tiny --prompt "import" --prompt "class" --max-new-tokens 200
    python tools/generate.py runs/tiny --prompt-file prompts.txt --json > texts.jsonl
    echo "for line in" | python tools/generate.py runs/tiny --temperature 0.8 --top-p 0.95 --seed 3

MODEL is a checkpoint, a run folder (its newest checkpoint that verifies), or a folder that
tools/convert_checkpoint.py wrote. Weights that are stored sparse stay so in memory.

Prompts come from --prompt, which may be given several times, from --prompt-file, or, without either, from standard
input, which is one prompt less a newline at its end. A prompt file has one prompt a line; if its name ends in .jsonl,
each line is a JSON string, or an object with one under "prompt". An empty prompt begins a new document.

What follows the prompt is printed as it comes, in whole characters; of several prompts in their order, each after a
line that shows the beginning of its prompt. A sequence stops at the end of the document, after --max-new-tokens, or,
with a note, where the model's context is full. On a terminal, control characters are shown as escapes. With --json,
each prompt becomes one line when it is done: prompt, text, its ids, the number of ids of the prompt, and why it
stopped ("end of document", "length" or "context").

Without --temperature the most probable token is taken each time. With it tokens are drawn; the same prompt, seed,
device and dtype give the same text, whatever other prompts there are, but for the rounding of sums: a batch makes them
in another order, which can turn a choice between two tokens that are as good as equal. --batch 1 makes that the same,
too.

exit codes:
  0    done, or whoever read the output has left
  2    the command line is wrong, the model, its tokenizer or a prompt cannot be used, or the output has no room
  130  interrupted
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from slope_dist.command_line import Parser, answer, path_argument
from slope_dist.errors import UserError
from slope_dist.files import read_bounded
from slope_dist.inference.command_line import add_model_options, model_of, say
from slope_dist.inference.generation import Continuation, Generation, Speed, Spelling, check_prompt, prompt_ids
from slope_dist.inference.model import InferenceModel
from slope_dist.inference.sampling import Sampling
from slope_dist.output import visible

MAX_PROMPT_BYTES = 2**28
SHOWN = 60
"""Characters of a prompt in the line before its text."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; `options.sampling` is made of its values.

    Raises:
        UserError: an option is unknown, missing, malformed or without effect.
    """
    parser = Parser(__doc__)
    add_model_options(parser)
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="to continue; may be repeated")
    prompts.add_argument("--prompt-file", type=path_argument, metavar="FILE", help="prompts, one a line, or .jsonl")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="of each text (%(default)s)")
    parser.add_argument("--temperature", type=float, metavar="T", help="draw tokens, from logits divided by T")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K most probable only")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the most probable that make up P only")
    parser.add_argument("--seed", type=int, metavar="N", help="of the draws (0)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="prompts at a time (%(default)s)")
    parser.add_argument(
        "--no-cache", action="store_true", help="compute each token from all before it, without keys and values kept"
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON for each prompt")
    options = parser.parse_args(arguments)
    if options.batch < 1:
        parser.error(f"--batch {options.batch} is less than 1")
    if options.max_new_tokens < 1:
        parser.error(f"--max-new-tokens {options.max_new_tokens} is less than 1")
    given = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    idle = [f"--{name.replace('_', '-')}" for name in given if name != "temperature"]
    if idle and not options.temperature:
        parser.error(f"{', '.join(idle)}: without a --temperature above 0 nothing is drawn")
    options.sampling = Sampling(**given)
    return options


def prompts_of(options: argparse.Namespace) -> list[str]:
    """The prompts that the options name.

    Raises:
        UserError: there is none, or a file cannot be read or is of another form.
    """
    if options.prompt is not None:
        return [_text(prompt, f"--prompt {prompt!r:.60}") for prompt in options.prompt]
    if options.prompt_file is None:
        if sys.stdin is None:
            raise UserError("standard input is closed; give --prompt or --prompt-file")
        if sys.stdin.isatty():
            say("note: the prompt is read from the terminal; end it with Ctrl-D on a line of its own")
        return [_decoded(sys.stdin.buffer.read(), "standard input").removesuffix("\n")]
    path = options.prompt_file
    try:
        text = _decoded(read_bounded(path, MAX_PROMPT_BYTES), str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    lines = text.removesuffix("\n").split("\n") if text else []
    if path.suffix == ".jsonl":
        found = [_of_json(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    else:
        found = [line.removesuffix("\r") for line in lines]
    if not found:
        raise UserError(f"{path} holds no prompt; give one a line")
    return found


def _decoded(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 text: bad byte at offset {error.start}") from error


def _of_json(line: str, where: str) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    text = found.get("prompt") if isinstance(found, dict) else found
    if not isinstance(text, str):
        raise UserError(f'{where} is neither a JSON string nor an object with one under "prompt"')
    return _text(text, where)


def _text(text: str, where: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{where} is not text: it has half a surrogate pair, or a byte that is no character")
    return text


class Printer:
    """Prints texts as they come, in the order of their prompts: of one at a time, while the others are kept back."""

    def __init__(self, prompts: Sequence[str], *, as_json: bool) -> None:
        self._prompts = prompts
        self._json = as_json
        self._kept = [""] * len(prompts)
        self._done: list[Continuation | None] = [None] * len(prompts)
        self._turn = 0
        self._is_begun = False
        # Whatever a model has learned, it must not steer the terminal.
        self._is_terminal = sys.stdout.isatty()

    def add(self, number: int, text: str) -> None:
        """More of the text of prompt `number`."""
        self._kept[number] += text
        if number == self._turn and not self._json:
            self._print()

    def end(self, number: int, continuation: Continuation) -> None:
        """The text of prompt `number` is whole."""
        self._done[number] = continuation
        while self._turn < len(self._done) and (found := self._done[self._turn]) is not None:
            if self._json:
                self._print_json(found)
            else:
                self._print()
                sys.stdout.write("\n")
                self._is_begun = False
            sys.stdout.flush()
            self._turn += 1
        if self._turn < len(self._done) and self._kept[self._turn] and not self._json:
            self._print()

    def _print(self) -> None:
        if not self._is_begun and len(self._prompts) > 1:
            prompt = visible(self._prompts[self._turn])
            shown = prompt if len(prompt) <= SHOWN else f"{prompt[: SHOWN - 3]}..."
            sys.stdout.write(f"--- {self._turn + 1}: {shown}\n")
        self._is_begun = True
        text, self._kept[self._turn] = self._kept[self._turn], ""
        if self._is_terminal:
            text = "".join(character if character in "\n\t" else visible(character) for character in text)
        sys.stdout.write(text)
        sys.stdout.flush()

    def _print_json(self, continuation: Continuation) -> None:
        row = {
            "prompt": self._prompts[self._turn],
            "text": self._kept[self._turn],
            "ids": continuation.new,
            "prompt_tokens": len(continuation.prompt),
            "stopped": continuation.reason,
        }
        # A name or a text may hold what the encoding of the output does not have.
        print(json.dumps(row))
        self._kept[self._turn] = ""


def run(options: argparse.Namespace) -> None:
    """Continue all prompts, print their texts, and say how fast it went."""
    texts = prompts_of(options)
    model = model_of(options)
    prompts = [prompt_ids(model.tokenizer, text) for text in texts]
    for number, prompt in enumerate(prompts, start=1):
        check_prompt(prompt, model, f"prompt {number}" if len(prompts) > 1 else "the prompt")
    printer, speed, full = Printer(texts, as_json=options.json), Speed(), 0
    for first in range(0, len(prompts), options.batch):
        generation = Generation(
            model,
            prompts[first : first + options.batch],
            max_new_tokens=options.max_new_tokens,
            end=model.tokenizer.end_of_document,
            sampling=options.sampling,
            cache=not options.no_cache,
        )
        _follow(generation, model, printer, first)
        speed.add(generation.speed)
        full += sum(continuation.reason == "context" for continuation in generation.sequences)
    if full:
        which = "the text" if len(prompts) == 1 else f"{full} of {len(prompts)} texts"
        say(f"note: {which} stopped where the model's context of {model.context} tokens is full")
    say(str(speed))


def _follow(generation: Generation, model: InferenceModel, printer: Printer, first: int) -> None:
    """Hand on to the printer what comes."""
    spellings = [Spelling(model.tokenizer) for _ in generation.sequences]
    for number, token in generation:
        if token is not None:
            printer.add(first + number, spellings[number].add(token))
        if generation.sequences[number].reason is not None:
            printer.add(first + number, spellings[number].end())
            printer.end(first + number, generation.sequences[number])


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return answer(lambda: run(parse(arguments)))


if __name__ == "__main__":
    # A text may hold characters that the terminal's encoding does not have.
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
