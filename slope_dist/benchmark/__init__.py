"""Measurements behind `tools/benchmark.py`: each beside its dense baseline, in the same run (rule R9).

One module a command (layer, traffic), over `timing`, `memory` and `machine`, which any of them can use. Only `traffic`,
which takes real steps, imports more than layers and sparse.
"""
