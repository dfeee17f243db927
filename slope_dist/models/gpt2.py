"""GPT-2 (Radford et al., 2019): learned positions, pre-norm, GELU by its tanh form, biases everywhere, a tied head.

Its published weights hold query, key and value in one matrix; here they are three, of which a tensor rank takes heads.

Shape letters: B batch, S sequence, H hidden, D head size, N heads, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from slope_dist.layers import LayerFactory
from slope_dist.models.attention import causal_attention, heads
from slope_dist.models.decoding import Part
from slope_dist.models.shape import ModelShape

TOKEN_TABLE = "transformer.wte"

FIRST_LINEARS = tuple(f"transformer.h.0.attn.{kind}_proj" for kind in "qkv")
"""The first linears after the input."""


class GPT2Embedding(nn.Module):
    """Token plus position embedding: int64 [B, S] -> [B, S, H]."""

    def __init__(self, make: LayerFactory, shape: ModelShape) -> None:
        super().__init__()
        std = shape.init_std
        self.tokens = make.token_embedding(TOKEN_TABLE, shape.vocab_size, shape.hidden_size, std=std)
        self.entry = make.stream_entry()
        self.positions = make.embedding("transformer.wpe", shape.sequence_length, shape.hidden_size, std=std)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """int64 [B, S], and positions [B, S] other than from 0 -> [B, S, H]."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        return self.entry(self.tokens(tokens)) + self.entry(self.positions(positions))


class GPT2Block(nn.Module):
    """Causal self-attention and a GELU feed-forward, each with a residual: [B, S, H] -> [B, S, H]."""

    def __init__(self, make: LayerFactory, shape: ModelShape, index: int) -> None:
        super().__init__()
        name = f"transformer.h.{index}"
        hidden, ffn, epsilon = shape.hidden_size, shape.ffn_size, shape.norm_epsilon
        std, out_std = shape.init_std, shape.residual_std
        self.head_size = shape.head_size
        self.attention_norm = make.layer_norm(f"{name}.ln_1", hidden, epsilon=epsilon)
        self.attention_input = make.split_input()
        self.q = make.linear(f"{name}.attn.q_proj", hidden, hidden, split="column", std=std)
        self.k = make.linear(f"{name}.attn.k_proj", hidden, hidden, split="column", std=std)
        self.v = make.linear(f"{name}.attn.v_proj", hidden, hidden, split="column", std=std)
        self.out = make.linear(f"{name}.attn.c_proj", hidden, hidden, split="row", std=out_std)
        self.ffn_norm = make.layer_norm(f"{name}.ln_2", hidden, epsilon=epsilon)
        self.ffn_input = make.split_input()
        self.up = make.linear(f"{name}.mlp.c_fc", hidden, ffn, split="column", std=std)
        self.down = make.linear(f"{name}.mlp.c_proj", ffn, hidden, split="row", std=out_std)

    def forward(self, hidden: Tensor, part: Part | None = None) -> Tensor:
        """[B, S, H] -> [B, S, H]; with `part`, of sequences whose beginning was seen before."""
        hidden = hidden + self.attention(self.attention_norm(hidden), part)
        return hidden + self.feed_forward(self.ffn_norm(hidden))

    def attention(self, x: Tensor, part: Part | None = None) -> Tensor:
        """Causal attention over the heads of this shard: [B, S, H] -> [B, S, H]."""
        x = self.attention_input(x)
        q, k, v = (heads(projection(x), self.head_size) for projection in (self.q, self.k, self.v))
        return self.out(causal_attention(q, k, v, part))

    def feed_forward(self, x: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        return self.down(functional.gelu(self.up(self.ffn_input(x)), approximate="tanh"))


class GPT2Head(nn.Module):
    """Final norm and tied logits: [B, S, H] -> [B, S, V]."""

    def __init__(self, make: LayerFactory, shape: ModelShape) -> None:
        super().__init__()
        self.norm = make.layer_norm("transformer.ln_f", shape.hidden_size, epsilon=shape.norm_epsilon)
        self.logits_input = make.split_input()
        self.logits = make.tied_head(TOKEN_TABLE, shape.vocab_size, shape.hidden_size, std=shape.init_std)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, V]."""
        return self.logits(self.logits_input(self.norm(hidden)))
