"""Claim: temperature, top-k and top-p leave exactly the tokens they should, in the right proportions, and draws follow
them; one prompt and seed is one random stream.

Run: pytest tests/inference/test_sampling.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slope_dist.errors import UserError
from slope_dist.inference.sampling import Sampling

LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40)


def softmax(logits: list[float], temperature: float) -> list[float]:
    scaled = torch.tensor(logits, dtype=torch.float64) / temperature
    return scaled.softmax(dim=0).tolist()


@settings(deadline=None)
@given(logits=LOGITS, temperature=st.floats(0.1, 5), k=st.integers(1, 50))
@example(logits=[0.0, 1.0, 1.1754943508222875e-38], temperature=1.0, k=2)
@example(logits=[0.0, 1.0, 1.1754943508222875e-38, 0.0], temperature=1.0, k=3)
def test_top_k_leaves_the_k_most_probable(logits: list[float], temperature: float, k: int) -> None:
    left = Sampling(temperature=temperature, top_k=k).probabilities(torch.tensor(logits)).tolist()
    expected = softmax(logits, temperature)
    kept = sorted(logits, reverse=True)[: min(k, len(logits))]
    # What has too small a part for fp32 is as good as left out.
    assert sum(p > 0 for p in left) <= len(kept)
    assert all(p == 0 for p, logit in zip(left, logits, strict=True) if logit < kept[-1])
    assert all(p > 0 for p, logit, e in zip(left, logits, expected, strict=True) if logit > kept[-1] and e > 1e-30)
    share = sum(sorted(expected, reverse=True)[: len(kept)])
    for p, e in zip(left, expected, strict=True):
        assert p == 0 or p == pytest.approx(e / share, rel=1e-4)
    assert sum(left) == pytest.approx(1, abs=1e-5)


@settings(deadline=None)
@given(logits=LOGITS, temperature=st.floats(0.1, 5), top_p=st.floats(0.01, 0.999))
def test_top_p_leaves_the_fewest_that_make_up_p(logits: list[float], temperature: float, top_p: float) -> None:
    left = Sampling(temperature=temperature, top_p=top_p).probabilities(torch.tensor(logits)).tolist()
    expected = softmax(logits, temperature)
    kept = [e for p, e in zip(left, expected, strict=True) if p > 0]
    out = [e for p, e in zip(left, expected, strict=True) if p == 0]
    assert kept
    assert max(out, default=0) <= min(kept) * (1 + 1e-5)
    # Enough, and not one more than needed; sums in fp32 are exact to some 1e-6.
    assert sum(kept) >= top_p - 1e-5
    assert sum(kept) - min(kept) <= top_p + 1e-5
    for p, e in zip(left, expected, strict=True):
        assert p == 0 or p == pytest.approx(e / sum(kept), rel=1e-4)


def test_top_p_is_of_what_top_k_leaves() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    left = Sampling(temperature=1, top_k=2, top_p=0.5).probabilities(logits)
    # 0.4 is 0.57 of the two that top-k leaves.
    assert left.tolist() == [1, 0, 0, 0]
    assert Sampling(temperature=1, top_p=0.5).probabilities(logits).count_nonzero() == 2


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    sampling = Sampling(temperature=0.5, top_k=3, seed=1)
    expected = sampling.probabilities(logits)
    generator = sampling.generator([1, 2])
    draws = torch.tensor([sampling.choose(logits, generator) for _ in range(4000)])
    found = torch.bincount(draws, minlength=4) / 4000
    assert found[3] == 0
    # Five standard deviations.
    assert bool(((found - expected).abs() <= 5 * (expected * (1 - expected) / 4000).sqrt()).all())


def test_temperature_0_takes_the_most_probable_and_a_small_one_nearly_always() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 2.0])
    assert Sampling().choose(logits, torch.Generator()) == 1
    # Divided by this, the logits themselves would be infinite.
    assert Sampling(temperature=1e-39).probabilities(logits).tolist() == [0, 0.5, 0.5, 0]


@pytest.mark.parametrize("values", [{"temperature": 1e-300}, {"temperature": 0.5, "top_p": 1e-300}])
def test_values_that_fp32_does_not_have_leave_the_most_probable(values: dict[str, float]) -> None:
    found = Sampling(**values).probabilities(torch.tensor([1.0, 3.0, 2.5]))  # type: ignore[arg-type]
    assert (found.dtype, found.tolist()) == (torch.float32, [0, 1, 0])


def test_a_stream_is_of_seed_prompt_and_draw() -> None:
    def stream(seed: int, prompt: list[int], draw: int) -> list[int]:
        generator = Sampling(temperature=1, seed=seed).generator(prompt, draw)
        return torch.randint(2**31, (8,), generator=generator).tolist()

    first = stream(3, [1, 23], 0)
    assert stream(3, [1, 23], 0) == first
    others = [stream(4, [1, 23], 0), stream(3, [1, 23], 1), stream(3, [12, 3], 0), stream(3, [1], 0)]
    assert first not in others
    assert len({tuple(other) for other in others}) == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0 is out of range"),
        ({"temperature": float("nan")}, "temperature nan is out of range"),
        ({"temperature": 1.0, "top_k": 0}, "top-k 0 leaves no token"),
        ({"temperature": 1.0, "top_p": 0.0}, "top-p 0.0 is out of range"),
        ({"temperature": 1.0, "top_p": 1.5}, "top-p 1.5 is out of range"),
        ({"temperature": 1.0, "seed": -1}, "seed -1 is out of range"),
        ({"top_k": 5}, "no effect at temperature 0"),
    ],
)
def test_bad_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**values)
