"""Triton kernels. These modules import triton at their top and are imported where they are first needed."""
