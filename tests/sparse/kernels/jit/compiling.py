"""Compiles the kernels of `adamw` and `decode` for a card that need not be there; run in a process of its own.

Triton's interpreter takes programs that its compiler refuses, and it is chosen for a whole process, by the environment.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slope_dist.sparse.kernels.jit import adamw, decode

POINTERS = {
    **dict.fromkeys(("master", "exp_avg", "exp_avg_sq", "step", "grad_scale", "low", "partial"), "*fp32"),
    **dict.fromkeys(("grad", "x", "bias", "down", "up", "out"), "*bf16"),
    **dict.fromkeys(("indices", "transposed_indices", "column_mask"), "*u8"),
    "words": "*i64",
}
FLOATS = ("lr", "decay", "eps", "scale")

ADAMW: dict[str, Any] = {
    "BETA1": 0.9,
    "BETA2": 0.95,
    "LOG_BETA1": math.log(0.9),
    "LOG_BETA2": math.log(0.95),
    "KIND": "bfloat16",
    "ALIASED": False,
    "TRANSPOSED": True,
    "STEP_LOADED": True,
    "SCALE_LOADED": True,
    "ROWS": adamw.ROWS,
    "GROUPS": adamw.GROUPS,
}
DECODE: dict[str, Any] = {"DTYPE": tl.bfloat16, "WIDE": True, "BIASED": False, "bias": None, "RANKED": True}
KERNELS: list[tuple[Any, dict[str, Any], dict[str, str], int]] = [
    (adamw._adamw_kernel, {**ADAMW, "MASKED": True}, {"values": "*i16", "transposed_values": "*i16"}, 8),
    (
        decode._product_kernel,
        {**DECODE, "FEW": True, "TOKENS": 2, "ROWS": 4, "UNITS": 256},
        {"values": "*i64", "out": "*fp32"},
        4,
    ),
    (
        decode._product_kernel,
        {**DECODE, "FEW": False, "TOKENS": 32, "ROWS": 32, "UNITS": 32},
        {"values": "*i64", "out": "*fp32"},
        4,
    ),
    (decode._finish_kernel, {"BIASED": True, "RANKED": True, "ROWS": 64, "RANK": 64}, {}, 4),
]
"""Kernel, constants, types that are not those of `POINTERS` or numbers, warps."""


def compile_for(capability: int) -> None:
    """Down to machine code for compute capability 80 or 90; prints what each kernel takes of shared memory."""
    for kernel, constants, types, warps in KERNELS:
        known = {**POINTERS, **dict.fromkeys(FLOATS, "fp32"), **types}
        signature = {name: "constexpr" if name in constants else known.get(name, "i32") for name in kernel.arg_names}
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, kind in enumerate(signature.values())
            if kind == "i32" or kind.startswith("*")
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": 3})
        assert len(made.asm["cubin"]) > 0
        print(f"sm_{capability} {made.metadata.name} shared {made.metadata.shared}")
