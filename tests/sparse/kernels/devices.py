"""Where the tests of kernels run: under Triton's interpreter on the CPU, or on a GPU."""

import pytest
import torch

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU"),
    ),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
        ],
    ),
]
"""Parameters "cpu" and "cuda" of a test, of which one runs and the other says why it does not."""
