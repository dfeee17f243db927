"""Measurements behind `tools/benchmark.py`: each beside its dense baseline, in the same run (rule R9).

One module a command (layer now), over `timing`, `memory` and `machine`, which any of them can use. Imports layers and
sparse only.
"""
