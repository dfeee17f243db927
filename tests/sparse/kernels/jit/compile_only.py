"""Compile each kernel that moves or prunes to machine code of a GPU that need not be there.

Run: python -m tests.sparse.kernels.jit.compile_only 80
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slope_dist.sparse.kernels.jit import expand, gather, permute, transpose


def compile_for(capability: int, kernel: Any, arguments: str, **constants: Any) -> None:
    """Compile with arguments of these types, such as "*i16 i32", in the order of those that are no constants."""
    names = list(inspect.signature(kernel.fn).parameters)
    types = iter(arguments.split())
    signature = {name: "constexpr" if name in constants else next(types) for name in names}
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    print(capability, kernel.fn.__name__, arguments, len(compiled.asm["cubin"]))


def main(capability: int) -> None:
    """Every kernel, for entries of both widths, with and without a held mask."""
    for bits in (16, 32):
        entries, largest = f"*i{bits}", 2 ** (bits - 1) - 1
        words = "*i64" if bits == 16 else "*i32"
        flat = {"STEPS": gather._STEPS, "BYTES": gather._BYTES}
        tiles = {"LARGEST": largest, "EIGHTS": transpose._EIGHTS}
        compile_for(capability, gather._gather, f"{entries} *u8 {entries} i32", **flat)
        for held, mask in ((True, "*u8 "), (False, "")):
            absent = {"HELD": held} if held else {"HELD": held, "held": None}
            kept = f"{entries} *u8 {mask}"
            compile_for(capability, expand._expand, f"{kept}{words} i32", PACKED=bits == 16, **flat, **absent)
            compile_for(capability, transpose._transpose, f"{kept}{entries} *u8 i32 i32", **tiles, **absent)
        compile_for(capability, expand._prune, f"{entries} *u8 {entries} i32", LARGEST=largest, BYTES=expand._BYTES)
    for long in (True, False):
        compile_for(capability, permute._permute, "*u8 *i32 *u8 i32 i32", LONG=long, BYTES=permute._BYTES)


if __name__ == "__main__":
    main(int(sys.argv[1]))
