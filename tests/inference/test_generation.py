"""Claim: texts are continued as transformers' `generate` does, greedily token for token, with and without a cache, in a
batch as alone; draws are a prompt's own; sequences stop where they should; sparse weights stay compressed meanwhile.

Run: pytest tests/inference/test_generation.py
"""

from __future__ import annotations

import gc
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_dist.data.tokenizer import Tokenizer
from slope_dist.errors import UserError
from slope_dist.inference import InferenceModel
from slope_dist.inference.generation import Generation, Spelling, prompt_ids
from slope_dist.inference.sampling import Sampling
from slope_dist.sparse import SparseWeight
from tests.export.models import random_stored
from tests.inference.conftest import TEXTS
from tests.inference.twins import merged_twin
from tests.models.twins import FORMS, LENGTH, VOCAB

NEW = 64
DRAWN = Sampling(temperature=1.5, top_p=0.95, seed=3)


def random_prompts(lengths: list[int], seed: int = 1) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(length)] for length in lengths]


def continued(model: InferenceModel, prompts: list[list[int]], new: int = NEW, **options: object) -> list[list[int]]:
    generation = Generation(model, prompts, max_new_tokens=new, **({"end": None} | options))  # type: ignore[arg-type]
    seen: list[list[int]] = [[] for _ in prompts]
    for number, token in generation:
        if token is not None:
            seen[number].append(token)
    # What is told as it comes is what is there in the end.
    assert seen == [sequence.new for sequence in generation.sequences]
    return seen


@pytest.mark.parametrize("form", ["opt", "gpt2", "llama", "mistral"])
def test_greedy_tokens_are_those_of_transformers(form: str) -> None:
    stored = random_stored(form, adapters=True)
    prompts = random_prompts([*range(1, 16), 3, 3, 3, 3, 3])
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    theirs = merged_twin(stored, form).generate(
        padded, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert len(prompts) == 20
    assert theirs.shape == (20, width + NEW)
    assert continued(InferenceModel(stored), prompts) == theirs[:, width:].tolist()


@pytest.mark.parametrize("form", FORMS)
def test_cache_and_batch_change_nothing(form: str) -> None:
    """Drawn, so that probabilities count too, and not the order of the logits alone."""
    model = InferenceModel(random_stored(form, adapters=form != "opt"))
    prompts = random_prompts([1, 17, 5, 30])
    together = continued(model, prompts, 12, sampling=DRAWN)
    assert together == continued(model, prompts, 12, sampling=DRAWN, cache=False)
    assert together == [continued(model, [prompt], 12, sampling=DRAWN)[0] for prompt in prompts]
    assert together == continued(model, prompts[::-1], 12, sampling=DRAWN)[::-1]
    assert len({tuple(tokens) for tokens in together}) == 4


@pytest.mark.parametrize("cache", [True, False])
def test_after_a_break_sequences_go_on_as_without_it(cache: bool) -> None:
    model = InferenceModel(random_stored("llama", adapters=True))
    prompts = random_prompts([4, 9, 2])
    expected = continued(model, prompts, 12, sampling=DRAWN)
    generation = Generation(model, prompts, max_new_tokens=12, end=None, sampling=DRAWN, cache=cache)
    # The second break comes between two sequences' tokens.
    for most in (6, 7):
        for _ in zip(range(most), generation, strict=False):
            pass
    generation.stop(2)
    assert {number for number, _ in generation} == {0, 1}
    found = [sequence.new for sequence in generation.sequences]
    assert found[:2] == expected[:2]
    assert found[2] == expected[2][: len(found[2])] != expected[2]
    assert list(generation) == []


def test_any_number_of_new_tokens_may_be_asked_for() -> None:
    model = InferenceModel(random_stored("opt"))
    (tokens,) = continued(model, random_prompts([model.context - 3]), 10**30)
    assert len(tokens) == 3


def test_a_seed_gives_the_same_again_and_another_something_else() -> None:
    model = InferenceModel(random_stored("gpt2"))
    (prompt,) = random_prompts([5])
    first = continued(model, [prompt], sampling=DRAWN)
    torch.manual_seed(1)
    assert continued(model, [prompt], sampling=DRAWN) == first
    assert continued(model, [prompt], sampling=Sampling(temperature=1.5, top_p=0.95, seed=4)) != first
    # The same prompt twice is the same text, unless another draw is asked for.
    assert continued(model, [prompt, prompt], sampling=DRAWN) == first * 2
    again = continued(model, [prompt, prompt], sampling=DRAWN, draws=[0, 1])
    assert again[0] == first[0] != again[1]


def test_top_k_1_is_greedy() -> None:
    model = InferenceModel(random_stored("llama"))
    prompts = random_prompts([4, 9])
    assert continued(model, prompts, 20, sampling=Sampling(temperature=9, top_k=1)) == continued(model, prompts, 20)


@pytest.mark.parametrize("form", ["opt", "llama"])
@pytest.mark.parametrize("cache", [True, False])
def test_the_end_of_the_context_stops_a_sequence_and_no_other(form: str, cache: bool) -> None:
    model = InferenceModel(random_stored(form))
    prompts = random_prompts([10, LENGTH - 1, LENGTH - 5])
    generation = Generation(model, prompts, max_new_tokens=50, end=None, cache=cache)
    for _ in generation:
        pass
    assert [sequence.reason for sequence in generation.sequences] == ["length", "context", "context"]
    assert [len(sequence.new) for sequence in generation.sequences] == [50, 1, 5]
    # The first went on in the cache beyond the place where the others ended.
    assert generation.sequences[0].new == continued(model, prompts[:1], 50)[0]


def test_the_end_of_a_document_and_whoever_asks_stop_a_sequence() -> None:
    model = InferenceModel(random_stored("mistral"))
    prompts = random_prompts([4, 9, 2])
    whole = continued(model, prompts, 30)
    end = whole[1][7]
    first = whole[1].index(end)
    generation = Generation(model, prompts, max_new_tokens=30, end=end)
    events = []
    for number, token in generation:
        events.append((number, token))
        if number == 2 and len(generation.sequences[2].new) == 3:
            generation.stop(2)
    assert generation.sequences[1].new == whole[1][:first]
    assert generation.sequences[1].reason == "end of document"
    assert events.count((1, None)) == 1
    assert generation.sequences[2].new == whole[2][:3]
    assert generation.sequences[2].reason == "told"
    cut = whole[0].index(end) if end in whole[0] else 30
    assert generation.sequences[0].new == whole[0][:cut]


def test_speed_counts_the_tokens_of_the_model() -> None:
    generation = Generation(InferenceModel(random_stored("gpt2")), random_prompts([4, 9]), max_new_tokens=5, end=None)
    for _ in generation:
        pass
    assert (generation.speed.prefill_tokens, generation.speed.decode_tokens) == (13, 8)
    assert generation.speed.prefill_seconds > 0 < generation.speed.decode_seconds
    assert str(generation.speed).startswith("prefill 13 tokens in ")


def whole_weights(shapes: set[tuple[int, int]]) -> list[torch.Tensor]:
    """Every tensor of these shapes that this process holds."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return [tensor for tensor in found if tuple(tensor.shape) in shapes]


def test_no_dense_weight_is_left_anywhere() -> None:
    stored = random_stored("llama", adapters=True, dtype=torch.bfloat16)
    shapes = {form.shape for form in stored.linears.values() if form.pattern is not None}
    assert len(shapes) > 2
    before = whole_weights(shapes)
    model = InferenceModel(stored)
    continued(model, random_prompts([4, 9]), 8)
    after = whole_weights(shapes)
    # Of all linears those alone that stay dense are there whole.
    assert len(after) - len(before) == sum(
        form.pattern is None for form in stored.linears.values() if form.shape in shapes
    )
    sparse = [module for module in model.module.modules() if isinstance(module, SparseWeight)]
    held = sum(tensor.nbytes for weight in sparse for tensor in (*weight.parameters(), *weight.buffers()))
    assert held == sum(2 * weight.shape[0] * weight.shape[1] for weight in sparse) * 9 / 16


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 2 has no tokens"),
        ([3, VOCAB], f"prompt 2 has the id {VOCAB}, which is not of the model's {VOCAB}"),
        ([-1], "prompt 2 has the id -1"),
        (
            [1] * LENGTH,
            f"prompt 2 has {LENGTH} tokens, and with at least one more they must fit .* context of {LENGTH}",
        ),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompt: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Generation(InferenceModel(random_stored("opt")), [[1], prompt], max_new_tokens=1, end=None)


def test_logits_that_are_not_finite_are_refused() -> None:
    model = InferenceModel(random_stored("opt"))
    with torch.no_grad():
        model.module.layers[-1].norm.bias[0] = torch.nan
    with pytest.raises(UserError, match=r"not finite in torch.float32; use another dtype"):
        continued(model, [[1]])


def test_an_empty_prompt_begins_a_document(tokenizer: Tokenizer) -> None:
    assert prompt_ids(tokenizer, "") == [tokenizer.end_of_document]
    assert prompt_ids(tokenizer, "of four") == tokenizer.encode("of four").tolist()


TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("é日\U0001f600 \n"), max_size=30)


@settings(deadline=None, max_examples=200)
@given(text=TEXT)
def test_text_comes_in_whole_characters(tokenizer: Tokenizer, sentencepiece: Tokenizer, text: str) -> None:
    for each in (tokenizer, sentencepiece):
        spelling = Spelling(each)
        parts = [spelling.add(token) for token in each.encode(text).tolist()]
        assert "".join(parts) == text
        assert spelling.end() == ""


def test_a_character_that_is_not_finished_is_shown_as_such(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.pieces.index(bytes([byte])) for byte in "\U0001f600".encode()]
    spelling = Spelling(tokenizer)
    assert [spelling.add(token) for token in ids] == ["", "", "", "\U0001f600"]
    assert [spelling.add(token) for token in ids[:3]] == [""] * 3
    assert spelling.end() == "\ufffd"
    # Neither the end of a document nor an id beyond the tokenizer is text.
    assert Spelling(tokenizer).add(tokenizer.end_of_document) == Spelling(tokenizer).add(tokenizer.vocab_size) == ""


def test_prompts_of_text_are_continued(model: InferenceModel) -> None:
    tokenizer = model.tokenizer
    prompts = [prompt_ids(tokenizer, text[:20]) for text in TEXTS]
    for tokens in continued(model, prompts, 10, end=tokenizer.end_of_document):
        assert tokenizer.end_of_document not in tokens
