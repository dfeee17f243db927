"""2:4 products on GPUs: vendor libraries, Triton kernels, and which of them computes what."""
