"""The runs by which predictions of memory are checked: every layout that two CPU ranks can run, in all its kinds.

Layout, precision and sparsity are crossed, and bf16 is there once with fp32 gradients and once with its own; family and
recomputation take turns, so that each meets every layout. FSDP2 does not train in fp16.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

SIZES: dict[str, Any] = {
    "model__hidden_size": 1024,
    "model__num_layers": 2,
    "model__num_heads": 16,
    "model__vocab_size": 8192,
    "model__sequence_length": 256,
    "training__micro_batch_size": 2,
    "training__global_batch_size": 8,
    "adapters__rank": 16,
}
"""A model of 20 to 35 million trained elements."""

FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {"model__family": "opt", "model__ffn_size": 4096},
    "gpt2": {"model__family": "gpt2", "model__ffn_size": 4096},
    "llama": {"model__family": "llama", "model__ffn_size": 2816, "model__num_kv_heads": 4},
}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone, ZeRO 0": (1, {"parallel__zero_stage": 0}),
    "alone, ZeRO 1": (1, {"parallel__zero_stage": 1}),
    "ZeRO 0": (2, {"parallel__zero_stage": 0}),
    "ZeRO 1": (2, {"parallel__zero_stage": 1}),
    "ZeRO 2": (2, {"parallel__zero_stage": 2}),
    "ZeRO 3": (2, {"parallel__zero_stage": 3}),
    "FSDP2": (2, {"parallel__engine": "fsdp"}),
    "tensor 2": (2, {"parallel__tensor": 2}),
    "tensor 2, sequence parallel": (2, {"parallel__tensor": 2, "parallel__sequence_parallel": True}),
    "pipeline 2, ZeRO 0": (2, {"parallel__pipeline": 2, "parallel__zero_stage": 0}),
    "pipeline 2, ZeRO 1": (2, {"parallel__pipeline": 2, "parallel__zero_stage": 1}),
}
"""Ranks, and the config's changes; a ZeRO stage not named is 1."""

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "bf16 gradients": {"precision": "bf16", "parallel__gradient_dtype": "model"},
    # Scaled so little that no step is left out.
    "fp16": {"precision": "fp16", "loss_scale__initial_power": 3},
}


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        name: what it is called in reports.
        ranks: how many it takes.
        changes: of the tests' small config.
    """

    name: str
    ranks: int
    changes: dict[str, Any]


def cases() -> list[Case]:
    """All of them."""
    made = []
    turns = list(product(FAMILIES, ("none", "blocks")))
    combinations = product(PRECISIONS, LAYOUTS, ("dense", "2:4"))
    for number, (precision, layout, pattern) in enumerate(combinations):
        if layout.endswith("ZeRO 0") and precision != "fp32":
            # Is run as ZeRO 1.
            continue
        if layout == "FSDP2" and precision == "fp16":
            continue
        family, recompute = turns[(number + number // len(turns)) % len(turns)]
        ranks, changes = LAYOUTS[layout]
        made.append(
            Case(
                f"{layout}; {precision}, {pattern}, {family}, recompute {recompute}",
                ranks,
                SIZES
                | FAMILIES[family]
                | changes
                | PRECISIONS[precision]
                | {"sparsity__pattern": pattern, "training__recompute": recompute},
            )
        )
    return made
