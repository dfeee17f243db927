"""Measurements behind `tools/benchmark.py`: each beside its dense baseline, in the same run (rule R9).

One module a command, over `timing`, `memory` and `machine`, which any of them can use. Those for GPUs (gemm, block,
step, decode, refresh) are of `cells`, each of which is in `results` once it is done; they run on the CPU too.
"""
