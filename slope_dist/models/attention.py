"""Causal attention over the heads of a shard, with grouped queries and rotary positions.

Shape letters: B batch, S sequence, D head size, N query heads, G key and value heads (N / G queries share one).
"""

from __future__ import annotations

from functools import lru_cache
from math import pi

import torch
from torch import Tensor
from torch.nn import functional

from slope_dist.models.decoding import Part
from slope_dist.models.shape import Rotary


def heads(x: Tensor, head_size: int) -> Tensor:
    """[B, S, N * D] -> [B, N, S, D]."""
    return x.unflatten(-1, (-1, head_size)).transpose(1, 2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, part: Part | None = None) -> Tensor:
    """[B, N, S, D], and [B, G, S, D] twice -> [B, S, N * D]; scores are scaled by 1 / sqrt(D).

    With `part`, the queries also see the keys and values of the parts before.
    """
    is_causal = True
    if part is not None:
        k, v = part.extend(k, v)
        # Without a mask the queries are the first tokens, or the last one alone, which sees all.
        is_causal = q.shape[2] > 1
    if part is not None and part.visible is not None:
        mixed = _masked_attention(q, k, v, part)
    else:
        grouped = q.shape[1] != k.shape[1]
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=grouped)
    return mixed.transpose(1, 2).flatten(2)


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, part: Part) -> Tensor:
    """[B, N, S, D], [B, G, L, D] twice, and what the queries see -> [B, N, S, D].

    The heads that share keys stand one after another as queries of one head: with a mask, torch's fused kernels know no
    grouped queries, and what is left copies keys and values for every head.
    """
    groups, length = k.shape[1], q.shape[2]
    share = q.shape[1] // groups
    q = q.unflatten(1, (groups, share)).flatten(2, 3)
    mixed = functional.scaled_dot_product_attention(q, k, v, part.visible_to(share))
    return mixed.unflatten(2, (share, length)).flatten(1, 2)


def rotate(x: Tensor, rotary: Rotary, part: Part | None = None) -> Tensor:
    """Turn each head's pairs of features (i, i + D / 2) by angles that grow with the position (arXiv 2104.09864).

    [B, N, S, D] -> [B, N, S, D]; the first token is at position 0, or where `part` says.
    """
    if part is None:
        tables = _tables(rotary, x.shape[-1], x.shape[-2], x.device)
    else:
        # One table for every part of a sequence, [B, 1, S, D] of it.
        whole = _tables(rotary, x.shape[-1], part.capacity, x.device)
        tables = (whole[0][part.positions].unsqueeze(1), whole[1][part.positions].unsqueeze(1))
    cosine, sine = (table.to(x.dtype) for table in tables)
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


def forget_tables() -> None:
    """Make the tables of positions anew when they are next needed."""
    _tables.cache_clear()


@lru_cache(maxsize=8)
def _tables(rotary: Rotary, head_size: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, fp32 [S, D] each."""
    # Whoever asks first may be in inference mode; a tensor made there could never be used in training.
    with torch.inference_mode(False), torch.no_grad():
        positions = torch.arange(length, dtype=torch.float32, device=device)
        angles = torch.outer(positions, frequencies(rotary, head_size).to(device))
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def frequencies(rotary: Rotary, head_size: int) -> Tensor:
    """Radians a position for each pair of features, fp32 [D / 2].

    With a scaling factor they are LLaMA-3's: slow ones are divided by it, fast ones stay, those between are mixed.
    """
    plain = 1.0 / rotary.base ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    if rotary.scaling is None:
        return plain
    turns = rotary.original_length / (2 * pi / plain)
    fast = ((turns - rotary.low_factor) / (rotary.high_factor - rotary.low_factor)).clamp(0, 1)
    return (1 - fast) * plain / rotary.scaling + fast * plain
