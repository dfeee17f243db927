"""Sequences continued token by token, several at a time.

Shape letters: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from slope_dist.data.tokenizer import Tokenizer
from slope_dist.errors import UserError
from slope_dist.inference.model import InferenceModel
from slope_dist.inference.sampling import Sampling
from slope_dist.models import Decoding

Reason = Literal["end of document", "length", "context", "told"]
"""Why a sequence stopped: the model ended it, it has all the tokens that were asked for, the model's context is full,
or `Generation.stop`."""


@dataclass
class Speed:
    """Tokens and seconds of the model alone, of prompts ("prefill") and of what follows ("decode").

    The first new token of each sequence comes from its prompt.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    def add(self, other: Speed) -> None:
        """Count another's work too."""
        self.prefill_tokens += other.prefill_tokens
        self.prefill_seconds += other.prefill_seconds
        self.decode_tokens += other.decode_tokens
        self.decode_seconds += other.decode_seconds

    def __str__(self) -> str:
        parts = [("prefill", self.prefill_tokens, self.prefill_seconds)]
        parts += [("decode", self.decode_tokens, self.decode_seconds)] if self.decode_tokens else []
        return ", ".join(
            f"{name} {tokens:,} tokens in {seconds:.2f} s ({tokens / max(seconds, 1e-9):,.1f} tokens/s)"
            for name, tokens, seconds in parts
        )


@dataclass
class Continuation:
    """One sequence.

    Attributes:
        prompt: ids it begins with.
        generator: its random stream.
        new: ids that followed; the end of the document is not among them.
        reason: why it stopped; None while it goes on.
    """

    prompt: list[int]
    generator: torch.Generator
    new: list[int] = field(default_factory=list)
    reason: Reason | None = None

    @property
    def ids(self) -> list[int]:
        """Prompt and what followed."""
        return self.prompt + self.new


class Generation:
    """Prompts that a model continues together.

    Iterating gives the number of a sequence and its next id as they come, None where the model ends it; the last of a
    sequence comes when its `reason` is there. What a sequence becomes does not depend on the others but for the
    rounding of sums, which a batch makes in another order.

    Attributes:
        sequences: in the order of the prompts.
        speed: of the model.
    """

    def __init__(
        self,
        model: InferenceModel,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        end: int | None,
        sampling: Sampling | None = None,
        draws: Sequence[int] | None = None,
        cache: bool = True,
    ) -> None:
        """Nothing is computed yet.

        Args:
            model: to ask.
            prompts: ids of each, at least one; see `prompt_ids`.
            max_new_tokens: of each sequence, 1 or more.
            end: id that ends a sequence; None: none does.
            sampling: how to choose; None: the most probable.
            draws: number of each sequence among those of the same prompt, which makes its draws others; None: 0.
            cache: keep keys and values; without, each token is computed from the whole of its sequence, alone.

        Raises:
            UserError: a prompt is empty, fills the context, or has an id outside the vocabulary.
        """
        if max_new_tokens < 1:
            raise UserError(f"{max_new_tokens} new tokens are less than 1")
        self._sampling = sampling or Sampling()
        for number, prompt in enumerate(prompts, start=1):
            check_prompt(prompt, model, f"prompt {number}" if len(prompts) > 1 else "the prompt")
        self.sequences = [
            Continuation(list(prompt), self._sampling.generator(prompt, draw))
            for prompt, draw in zip(prompts, draws or [0] * len(prompts), strict=True)
        ]
        self.speed = Speed()
        self._model = model
        self._end = end
        self._most = max_new_tokens
        self._cache = cache

    def stop(self, number: int) -> None:
        """Let a sequence end with the token that came last."""
        self.sequences[number].reason = "told"

    def __iter__(self) -> Iterator[tuple[int, int | None]]:
        """Go on until all sequences have stopped; after a break, from where each of them is."""
        going = [number for number, sequence in enumerate(self.sequences) if sequence.reason is None]
        decoding = self._decoding(going) if self._cache and going else None
        is_prefill = True
        while going:
            before = going
            tokens = sum(len(self.sequences[number].ids) for number in going)
            start = time.perf_counter()
            logits = self._logits(going, decoding)
            seconds = time.perf_counter() - start
            if is_prefill:
                self.speed.add(Speed(prefill_tokens=tokens, prefill_seconds=seconds))
            else:
                self.speed.add(Speed(decode_tokens=len(going), decode_seconds=seconds))
            is_prefill = False
            for number, row in zip(going, logits, strict=True):
                # Drawn when it is asked for: after a break no draw is lost.
                token = self._sampling.choose(row, self.sequences[number].generator)
                yield number, self._append(self.sequences[number], token)
            going = [number for number in going if self.sequences[number].reason is None]
            if decoding is not None and going and going != before:
                decoding.keep(torch.tensor([before.index(number) for number in going], device=self._model.device))

    def _append(self, sequence: Continuation, token: int) -> int | None:
        if token == self._end:
            sequence.reason = "end of document"
            return None
        sequence.new.append(token)
        if len(sequence.new) == self._most:
            sequence.reason = "length"
        elif len(sequence.prompt) + len(sequence.new) >= self._model.context:
            sequence.reason = "context"
        return token

    def _decoding(self, going: list[int]) -> Decoding:
        """A cache for these sequences, the shorter ones padded on the left."""
        sequences = [self.sequences[number] for number in going]
        lengths = torch.tensor([len(sequence.ids) for sequence in sequences])
        longest = int(lengths.max())
        # The last token of a sequence is not put in.
        grown = torch.tensor([min(len(each.prompt) + self._most, self._model.context) - 1 for each in sequences])
        capacity = longest + int((grown - lengths).max())
        return Decoding((longest - lengths).to(self._model.device), capacity)

    def _logits(self, going: list[int], decoding: Decoding | None) -> Tensor:
        """Of the next token of each of these: fp32 [B, V] on the CPU."""
        if decoding is None:
            each = [self.sequences[number].ids for number in going]
            rows = [self._model.logits(torch.tensor([ids]), since=len(ids) - 1)[:, -1] for ids in each]
            logits = torch.cat(rows)
        elif decoding.seen == 0:
            padding = decoding.padding.tolist()
            tokens = [[0] * pad + self.sequences[number].ids for number, pad in zip(going, padding, strict=True)]
            logits = self._model.logits(torch.tensor(tokens), decoding, since=len(tokens[0]) - 1)[:, -1]
        else:
            tokens = [[self.sequences[number].new[-1]] for number in going]
            logits = self._model.logits(torch.tensor(tokens), decoding)[:, -1]
        logits = logits.float().cpu()
        if not logits.isfinite().all():
            raise UserError(
                f"the model's logits are not finite in {self._model.dtype}; use another dtype, such as fp32"
            )
        return logits


def check_prompt(prompt: Sequence[int], model: InferenceModel, what: str) -> None:
    """Refuse a prompt that cannot be continued.

    Raises:
        UserError: naming `what`.
    """
    if not prompt:
        raise UserError(f"{what} has no tokens; begin with the id that ends a document")
    bad = next((token for token in prompt if not 0 <= token < model.vocab_size), None)
    if bad is not None:
        raise UserError(
            f"{what} has the id {bad}, which is not of the model's {model.vocab_size}; is the tokenizer the model's?"
        )
    if len(prompt) >= model.context:
        raise UserError(
            f"{what} has {len(prompt)} tokens, and with at least one more they must fit into the model's context of "
            f"{model.context}; shorten it"
        )


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a prompt. One without text begins a new document, which in training follows the end of another."""
    return tokenizer.encode(text).tolist() or [tokenizer.end_of_document]


class Spelling:
    """The text of ids that come one after another, in whole characters.

    Bytes that are no UTF-8 become U+FFFD; ids that are no text give nothing.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._pieces = tokenizer.pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """All characters that this id completes."""
        # A vocabulary may have been made longer than the tokenizer.
        return self._decoder.decode(self._pieces[token] if token < len(self._pieces) else b"")

    def end(self) -> str:
        """What is left when no id follows."""
        return self._decoder.decode(b"", final=True)
