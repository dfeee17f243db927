"""LLaMA (arXiv 2302.13971, 2407.21783) and Mistral (arXiv 2310.06825), which differ in numbers alone.

RMSNorm before each sub-block, rotary positions, grouped queries, SwiGLU, no biases, a head of its own unless tied.
Mistral is that of v0.3, without a sliding window.

Shape letters: B batch, S sequence, H hidden, D head size, N query heads, G key and value heads, V vocabulary.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from slope_dist.layers import LayerFactory
from slope_dist.models.attention import causal_attention, heads, rotate
from slope_dist.models.decoding import Part
from slope_dist.models.shape import ModelShape

TOKEN_TABLE = "model.embed_tokens"

FIRST_LINEARS = tuple(f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv")
"""The first linears after the input."""


class LlamaEmbedding(nn.Module):
    """Token embedding: int64 [B, S] -> [B, S, H]."""

    def __init__(self, make: LayerFactory, shape: ModelShape) -> None:
        super().__init__()
        self.tokens = make.token_embedding(TOKEN_TABLE, shape.vocab_size, shape.hidden_size, std=shape.init_std)
        self.entry = make.stream_entry()

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """int64 [B, S] -> [B, S, H]; positions come in with the attention."""
        return self.entry(self.tokens(tokens))


class LlamaBlock(nn.Module):
    """Causal self-attention and a gated feed-forward, each with a residual: [B, S, H] -> [B, S, H]."""

    def __init__(self, make: LayerFactory, shape: ModelShape, index: int) -> None:
        super().__init__()
        name = f"model.layers.{index}"
        hidden, ffn, grouped = shape.hidden_size, shape.ffn_size, shape.kv_heads * shape.head_size
        column = partial(make.linear, split="column", std=shape.init_std, bias=False)
        row = partial(make.linear, split="row", std=shape.residual_std, bias=False)
        self.head_size = shape.head_size
        self.rotary = shape.rotary
        self.attention_norm = make.rms_norm(f"{name}.input_layernorm", hidden, epsilon=shape.norm_epsilon)
        self.attention_input = make.split_input()
        self.q = column(f"{name}.self_attn.q_proj", hidden, hidden)
        self.k = column(f"{name}.self_attn.k_proj", hidden, grouped)
        self.v = column(f"{name}.self_attn.v_proj", hidden, grouped)
        self.out = row(f"{name}.self_attn.o_proj", hidden, hidden)
        self.ffn_norm = make.rms_norm(f"{name}.post_attention_layernorm", hidden, epsilon=shape.norm_epsilon)
        self.ffn_input = make.split_input()
        self.gate = column(f"{name}.mlp.gate_proj", hidden, ffn)
        self.up = column(f"{name}.mlp.up_proj", hidden, ffn)
        self.down = row(f"{name}.mlp.down_proj", ffn, hidden)

    def forward(self, hidden: Tensor, part: Part | None = None) -> Tensor:
        """[B, S, H] -> [B, S, H]; with `part`, of sequences whose beginning was seen before."""
        hidden = hidden + self.attention(self.attention_norm(hidden), part)
        return hidden + self.feed_forward(self.ffn_norm(hidden))

    def attention(self, x: Tensor, part: Part | None = None) -> Tensor:
        """Causal attention over the heads of this shard: [B, S, H] -> [B, S, H]."""
        x = self.attention_input(x)
        q, k, v = (heads(projection(x), self.head_size) for projection in (self.q, self.k, self.v))
        return self.out(causal_attention(rotate(q, self.rotary, part), rotate(k, self.rotary, part), v, part))

    def feed_forward(self, x: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        x = self.ffn_input(x)
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class LlamaHead(nn.Module):
    """Final norm and logits: [B, S, H] -> [B, S, V]."""

    def __init__(self, make: LayerFactory, shape: ModelShape) -> None:
        super().__init__()
        self.norm = make.rms_norm("model.norm", shape.hidden_size, epsilon=shape.norm_epsilon)
        self.logits_input = make.split_input()
        head, name = (make.tied_head, TOKEN_TABLE) if shape.tied_head else (make.head, "lm_head")
        self.logits = head(name, shape.vocab_size, shape.hidden_size, std=shape.init_std)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, V]."""
        return self.logits(self.logits_input(self.norm(hidden)))
