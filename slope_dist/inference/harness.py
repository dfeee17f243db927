"""Models for lm-eval-harness, under the name "slope".

The harness finds models in its own registry, where this module puts its own when it is imported; it looks for none in
other packages. So tools/lm_eval.py imports this and hands over to the harness's command line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slope_dist.errors import UserError
from slope_dist.inference.command_line import load, say
from slope_dist.inference.generation import Generation, Spelling, prompt_ids
from slope_dist.inference.model import InferenceModel
from slope_dist.inference.sampling import Sampling
from slope_dist.inference.scoring import Question, score, windows

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import simple_parse_args_string
    from tqdm import tqdm
except ImportError as error:
    raise UserError(
        f"lm-eval-harness is not installed ({error}); pip install -c constraints.txt -e '.[evaluation]'"
    ) from error

DEFAULT_NEW_TOKENS = 256
"""Where a task does not say how many, as in the harness's own models."""

_BATCH = 8


@register_model("slope")
class SlopeLM(TemplateLM):
    """A checkpoint or converted model as lm-eval-harness asks it.

    Model arguments: path, and tokenizer, dtype, device, batch_size, seed (of tasks that draw).
    """

    def __init__(
        self,
        path: str | Path | InferenceModel | None = None,
        *,
        tokenizer: str | Path | None = None,
        dtype: str | None = None,
        device: str = "cpu",
        batch_size: int | str = _BATCH,
        max_batch_size: int | None = None,
        seed: int = 0,
        **others: Any,
    ) -> None:
        """Load the model.

        Args:
            path: of the model; or the model itself.
            tokenizer: path of the tokenizer, where it is not the one with the model.
            dtype: "fp32", "bf16" or "fp16"; None: as stored.
            device: "cpu" or "cuda".
            batch_size: sequences at a time.
            max_batch_size: of the harness's search for a size, which is not made.
            seed: of draws.

        Raises:
            UserError: an argument is unknown or out of range, or the model cannot be loaded.
        """
        super().__init__()
        if others:
            raise UserError(
                f"model_args: {', '.join(others)}: unknown; known are path, tokenizer, dtype, device, batch_size, seed"
            )
        if path is None:
            raise UserError("model_args: no path; give --model_args path=MODEL")
        if not str(batch_size).isdecimal() or int(batch_size) < 1 or max_batch_size is not None:
            raise UserError(f"batch size {batch_size}: no size is searched for; give a number from 1")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise UserError(f"model_args: seed {seed} is not a whole number")
        # Refused now, not after the first task was read.
        Sampling(seed=seed)
        if not isinstance(path, InferenceModel):
            # The harness makes numbers of what looks like one.
            given = None if tokenizer is None else Path(str(tokenizer))
            path = load(Path(str(path)), tokenizer=given, dtype=dtype, device=str(device))
        self.model = path
        self._batch = int(batch_size)
        self._seed = seed
        self._lengths = self.model.tokenizer.piece_bytes()

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> SlopeLM:
        """From --model_args, which go before the harness's own options."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        # The harness asks for a GPU where nobody has said anything, whether there is one or not.
        if "device" in options and "device" not in arg_dict and not torch.cuda.is_available():
            if options["device"] != "cpu":
                say("note: torch finds no GPU, so the model is on the CPU")
            options["device"] = "cpu"
        return cls(**(options | arg_dict))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> SlopeLM:
        """From --model_args as text."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def batch_size(self) -> int:
        """Sequences at a time; the harness writes it into its results."""
        return self._batch

    @property
    def device(self) -> str:
        """Where it computes."""
        return str(self.model.device)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document; texts without context follow it."""
        return self.model.tokenizer.end_of_document

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of requests tells tokenizers apart by."""
        return self.model.tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, without any that are no text."""
        return self.model.tokenizer.encode(string).tolist()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Refused."""
        raise UserError("these models have no chat template; leave --apply_chat_template out")

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of context and continuation as they are in one text.

        Blanks between them belong to the continuation. A token that holds the end of one and the beginning of the other
        counts as the continuation's.
        """
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        ids = self.tok_encode(stripped + continuation)
        # Counted from the end: some tokenizers put a space before a text.
        left, cut = len(continuation.encode()), len(ids)
        while left > 0:
            cut -= 1
            left -= int(self._lengths[ids[cut]])
        return ids[:cut] or [self.prefix_token_id], ids[cut:]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        questions = []
        for (_context, text), context, continuation in requests:
            if not 1 <= len(continuation) <= self.model.context:
                raise UserError(
                    f"the continuation {text!r:.60} has {len(continuation)} tokens; at least 1 and at most the model's "
                    f"context of {self.model.context} can be predicted"
                )
            # The last one is predicted and not put in.
            ids = np.array((context + continuation)[-(self.model.context + 1) :], dtype=np.int64)
            questions.append(Question(ids, len(continuation)))
        return self._answers(questions, [request[0] for request in requests], disable_tqdm)

    def _answers(
        self, questions: Sequence[Question], cached_as: Sequence[tuple[str, str]] | None, disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        """Log-probability and greediness, those of like length together, the longest first."""
        order = sorted(range(len(questions)), key=lambda number: -len(questions[number].ids))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(questions)
        with tqdm(total=len(questions), desc="loglikelihood", disable=disable_tqdm) as bar:
            for first in range(0, len(order), self._batch):
                numbers = order[first : first + self._batch]
                found = score(self.model, [questions[number] for number in numbers])
                for number, answer in zip(numbers, found, strict=True):
                    answers[number] = (answer.log_probability, answer.greedy)
                    if cached_as is not None:
                        self.cache_hook.add_partial("loglikelihood", cached_as[number], answers[number])
                bar.update(len(numbers))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, each token from as many before it as the context holds in windows."""
        questions, owners = [], []
        for number, request in enumerate(requests):
            ids = np.array([self.prefix_token_id, *self.tok_encode(request.args[0])], dtype=np.int64)
            for window in windows(len(ids), self.model.context, self.model.context):
                questions.append(Question(ids[window.start : window.stop], window.stop - window.predicted))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._answers(questions, None, disable_tqdm), strict=True):
            totals[owner] += nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that follow contexts, up to the first stop string, which is not part of them.

        A context that is too long keeps its end. The same context asked for again is drawn anew.
        """
        texts = [""] * len(requests)
        seen: Counter[str] = Counter()
        jobs = []
        for number, request in enumerate(requests):
            context, settings = request.args
            jobs.append((number, context, _Settings(settings, self._seed), seen[repr(request.args)]))
            seen[repr(request.args)] += 1
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for together in self._alike(jobs):
                found = self._generate([job[1] for job in together], together[0][2], [job[3] for job in together])
                for (number, *_), text in zip(together, found, strict=True):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                bar.update(len(together))
        return texts

    def _alike(
        self, jobs: Sequence[tuple[int, str, _Settings, int]]
    ) -> Iterator[list[tuple[int, str, _Settings, int]]]:
        """Batches of one setting each, of like length."""
        groups: dict[str, list[tuple[int, str, _Settings, int]]] = {}
        for job in jobs:
            groups.setdefault(repr(vars(job[2])), []).append(job)
        for group in groups.values():
            group.sort(key=lambda job: -len(job[1]))
            for first in range(0, len(group), self._batch):
                yield group[first : first + self._batch]

    def _generate(self, contexts: Sequence[str], settings: _Settings, draws: Sequence[int]) -> list[str]:
        room = self.model.context - settings.max_new_tokens
        if room < 1:
            raise UserError(
                f"the task asks for {settings.max_new_tokens} new tokens, which leaves no room in the model's context "
                f"of {self.model.context}; ask for less with --gen_kwargs max_gen_toks=N"
            )
        prompts = [prompt_ids(self.model.tokenizer, context)[-room:] for context in contexts]
        generation = Generation(
            self.model,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            end=self.eot_token_id,
            sampling=settings.sampling,
            draws=draws,
        )
        texts = [""] * len(prompts)
        spellings = [Spelling(self.model.tokenizer) for _ in prompts]
        for number, token in generation:
            if token is not None:
                texts[number] += spellings[number].add(token)
                if any(stop in texts[number] for stop in settings.until):
                    generation.stop(number)
        return [_cut(text + spelling.end(), settings.until) for text, spelling in zip(texts, spellings, strict=True)]


class _Settings:
    """A task's generation settings, as far as they are known here."""

    def __init__(self, settings: Mapping[str, Any], seed: int) -> None:
        try:
            known = normalize_gen_kwargs(dict(settings), DEFAULT_NEW_TOKENS)
            self.max_new_tokens = int(known.pop("max_gen_toks"))
            self.until = [str(stop) for stop in known.pop("until", []) if stop]
            is_drawn = known.pop("do_sample", False)
            temperature = float(known.pop("temperature", 0.0))
            # 0 and 1.0 are how other libraries say "all".
            top_k, top_p = int(known.pop("top_k", None) or 0) or None, float(known.pop("top_p", None) or 1.0)
        except (TypeError, ValueError) as error:
            raise UserError(f"generation settings of the task: {error}") from error
        if known:
            raise UserError(
                f"generation settings of the task: {', '.join(known)}: unknown; known are until, max_gen_toks, "
                "do_sample, temperature, top_k, top_p"
            )
        if is_drawn and temperature > 0:
            self.sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        else:
            self.sampling = Sampling()


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of these strings."""
    places = [place for stop in until if (place := text.find(stop)) >= 0]
    return text[: min(places, default=len(text))]


def command_line() -> None:
    """The harness's own command line, which reads `sys.argv`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
