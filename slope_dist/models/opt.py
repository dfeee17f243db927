"""OPT (arXiv 2205.01068): learned positions with an offset of two, ReLU, biases everywhere, a tied head.

Pre-norm, but for the 350M model, whose norms follow the residual sum and whose embeddings are narrower than its blocks.

Shape letters: B batch, S sequence, H hidden, E embedding (= H but for 350M), D head size, N heads, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from slope_dist.layers import LayerFactory
from slope_dist.models.attention import causal_attention, heads
from slope_dist.models.decoding import Part
from slope_dist.models.shape import ModelShape

POSITION_OFFSET = 2
"""The first two rows of the position table are never read: the published weights begin at row 2."""

TOKEN_TABLE = "decoder.embed_tokens"

FIRST_LINEARS = (
    "decoder.layers.0.self_attn.q_proj",
    "decoder.layers.0.self_attn.k_proj",
    "decoder.layers.0.self_attn.v_proj",
)
"""The first linears after the input."""


class OPTEmbedding(nn.Module):
    """Token plus position embedding: int64 [B, S] -> [B, S, H]."""

    def __init__(self, make: LayerFactory, shape: ModelShape) -> None:
        super().__init__()
        rows = shape.sequence_length + POSITION_OFFSET
        self.tokens = make.token_embedding(TOKEN_TABLE, shape.vocab_size, shape.embedding_size, std=shape.init_std)
        self.entry = make.stream_entry()
        self.positions = make.embedding("decoder.embed_positions", rows, shape.hidden_size, std=shape.init_std)
        self.project = None
        if shape.embedding_size != shape.hidden_size:
            self.project = make.linear(
                "decoder.project_in",
                shape.embedding_size,
                shape.hidden_size,
                split="whole",
                std=shape.init_std,
                bias=False,
            )

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """int64 [B, S], and positions [B, S] other than from 0 -> [B, S, H]."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        embedded = self.entry(self.tokens(tokens))
        if self.project is not None:
            embedded = self.project(embedded)
        return embedded + self.entry(self.positions(positions + POSITION_OFFSET))


class OPTBlock(nn.Module):
    """Causal self-attention and a ReLU feed-forward, each with a residual: [B, S, H] -> [B, S, H]."""

    def __init__(self, make: LayerFactory, shape: ModelShape, index: int) -> None:
        super().__init__()
        name = f"decoder.layers.{index}"
        hidden, ffn = shape.hidden_size, shape.ffn_size
        std, out_std = shape.init_std, shape.residual_std
        self.head_size = shape.head_size
        self.norm_first = shape.norm_position == "pre"
        self.attention_norm = make.layer_norm(f"{name}.self_attn_layer_norm", hidden, epsilon=shape.norm_epsilon)
        self.attention_input = make.split_input()
        self.q = make.linear(f"{name}.self_attn.q_proj", hidden, hidden, split="column", std=std)
        self.k = make.linear(f"{name}.self_attn.k_proj", hidden, hidden, split="column", std=std)
        self.v = make.linear(f"{name}.self_attn.v_proj", hidden, hidden, split="column", std=std)
        self.out = make.linear(f"{name}.self_attn.out_proj", hidden, hidden, split="row", std=out_std)
        self.ffn_norm = make.layer_norm(f"{name}.final_layer_norm", hidden, epsilon=shape.norm_epsilon)
        self.ffn_input = make.split_input()
        self.up = make.linear(f"{name}.fc1", hidden, ffn, split="column", std=std)
        self.down = make.linear(f"{name}.fc2", ffn, hidden, split="row", std=out_std)

    def forward(self, hidden: Tensor, part: Part | None = None) -> Tensor:
        """[B, S, H] -> [B, S, H]; with `part`, of sequences whose beginning was seen before."""
        if self.norm_first:
            hidden = hidden + self.attention(self.attention_norm(hidden), part)
            return hidden + self.feed_forward(self.ffn_norm(hidden))
        hidden = self.attention_norm(hidden + self.attention(hidden, part))
        return self.ffn_norm(hidden + self.feed_forward(hidden))

    def attention(self, x: Tensor, part: Part | None = None) -> Tensor:
        """Causal attention over the heads of this shard: [B, S, H] -> [B, S, H]."""
        x = self.attention_input(x)
        q, k, v = (heads(projection(x), self.head_size) for projection in (self.q, self.k, self.v))
        return self.out(causal_attention(q, k, v, part))

    def feed_forward(self, x: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        return self.down(functional.relu(self.up(self.ffn_input(x))))


class OPTHead(nn.Module):
    """Final norm and tied logits: [B, S, H] -> [B, S, V]."""

    def __init__(self, make: LayerFactory, shape: ModelShape) -> None:
        super().__init__()
        # The 350M model, alone, has no norm here: its blocks already end in one.
        self.norm = None
        if shape.norm_position == "pre":
            self.norm = make.layer_norm("decoder.final_layer_norm", shape.hidden_size, epsilon=shape.norm_epsilon)
        self.project = None
        if shape.embedding_size != shape.hidden_size:
            self.project = make.linear(
                "decoder.project_out",
                shape.hidden_size,
                shape.embedding_size,
                split="whole",
                std=shape.init_std,
                bias=False,
            )
        self.logits_input = make.split_input()
        self.logits = make.tied_head(TOKEN_TABLE, shape.vocab_size, shape.embedding_size, std=shape.init_std)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, V]."""
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.project is not None:
            hidden = self.project(hidden)
        return self.logits(self.logits_input(hidden))
