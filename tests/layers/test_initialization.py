"""Initial values depend on seed, name and global coordinates alone: a part equals the slice of the whole to the bit.

The pinned values guard every run that was ever begun: if they change, no shipped seed means what it meant.

Run: pytest tests/layers/test_initialization.py
"""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_dist.layers import initialization

pytestmark = pytest.mark.usefixtures("nan_scratch")

NAME = "decoder.layers.0.fc1.weight"


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


@st.composite
def shape_and_part(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """A global shape of one to nine blocks, and a part of it, often one that ends at or near a block's edge."""
    shape = draw(st.integers(1, 600)), draw(st.integers(1, 600))
    ranges = []
    for size in shape:
        near = [edge for edge in (0, 1, 255, 256, 257, 511, 512, 513, size) if edge <= size]
        position = st.one_of(st.sampled_from(near), st.integers(0, size))
        first, last = sorted((draw(position), draw(position)))
        ranges.append((first, last))
    return shape, ranges[0], ranges[1]


@settings(max_examples=40, deadline=None)
@given(shape_and_part(), st.integers(0, 2**31 - 1))
def test_a_part_is_the_slice_of_the_whole(drawn, seed: int) -> None:
    shape, rows, columns = drawn
    whole = initialization.normal(seed, NAME, shape, 0.02)
    part = initialization.normal(seed, NAME, shape, 0.02, rows=rows, columns=columns)
    assert whole.shape == shape and not whole.isnan().any()
    assert part.equal(whole[slice(*rows), slice(*columns)])
    assert initialization.normal(seed, NAME, shape, 0.02, rows=rows).equal(whole[slice(*rows)])
    assert initialization.normal(seed, NAME, shape, 0.02, columns=columns).equal(whole[:, slice(*columns)])


def test_blocks_names_and_seeds_are_independent() -> None:
    whole = initialization.normal(1, NAME, (512, 512), 1.0)
    streams = [block for band in whole.split(256) for block in band.split(256, dim=1)]
    for seed, name in ((2, NAME), (1, NAME + "s"), (1, "decoder.layers.1.fc1.weight"), (12, NAME), (-1, NAME)):
        streams.append(initialization.normal(seed, name, (256, 256), 1.0))
    correlation = torch.corrcoef(torch.stack([stream.flatten() for stream in streams]))
    off_diagonal = correlation - torch.eye(len(streams))
    # 65536 samples a stream: a correlation by chance has standard deviation 1 / 256.
    assert float(off_diagonal.abs().max()) < 5 / 256


def test_moments_and_tails_are_those_of_a_normal() -> None:
    std = 0.02
    sample = initialization.normal(3, NAME, (1024, 1024), std).double() / std
    error = 1 / 1024
    assert abs(float(sample.mean())) < 4 * error
    assert float(sample.var()) == pytest.approx(1, abs=4 * 2**0.5 * error)
    assert float((sample**4).mean()) == pytest.approx(3, abs=4 * 96**0.5 * error)
    for threshold, share in ((1, 0.317311), (2, 0.045500), (3, 0.002700)):
        assert float((sample.abs() > threshold).double().mean()) == pytest.approx(share, rel=0.08)


def test_the_standard_deviation_only_scales() -> None:
    unit = initialization.normal(4, NAME, (30, 30), 1.0)
    assert initialization.normal(4, NAME, (30, 30), 0.25).equal(unit * 0.25)


def test_pinned_values() -> None:
    block = initialization.normal(1, NAME, (8, 8), 1.0)
    assert block[0, :4].tolist() == [0.45848965644836426, 0.803125262260437, 0.061942558735609055, -0.3429942727088928]
    assert digest(block) == "a076d1ecdcc4ec937c39e75de6884a551ae242e04aa34562f270c659ddfb90e8"
    corner_of_four_blocks = initialization.normal(1, NAME, (600, 300), 1.0, rows=(250, 262), columns=(250, 262))
    assert digest(corner_of_four_blocks) == "8ad177f974905ebc569dd649c442e3abc7637ad8c1bb0397b7a3879f9705e431"


def test_torch_random_state_is_neither_read_nor_moved() -> None:
    before = torch.get_rng_state()
    first = initialization.normal(1, NAME, (16, 16), 1.0)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(99)
    assert initialization.normal(1, NAME, (16, 16), 1.0).equal(first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_does_not_change_the_draw(dtype: torch.dtype) -> None:
    expected = initialization.normal(1, NAME, (16, 16), 0.02)
    torch.set_default_dtype(dtype)
    drawn = initialization.normal(1, NAME, (16, 16), 0.02)
    assert drawn.dtype == torch.float32
    assert drawn.equal(expected)


def test_a_default_device_does_not_change_the_draw() -> None:
    expected = initialization.normal(1, NAME, (16, 16), 0.02)
    with torch.device("meta"):
        drawn = initialization.normal(1, NAME, (16, 16), 0.02)
    assert drawn.device.type == "cpu"
    assert drawn.equal(expected)
