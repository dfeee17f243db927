"""2:4 products on GPUs: vendor libraries, Triton kernels, and which of them computes what.

Importable without a GPU; nothing is compiled, and no library is opened, before it is first used. What a product *is*
stands in `slope_dist.sparse.reference` (rule R5); nothing here may give anything else.
"""

from slope_dist.sparse.kernels import ops  # noqa: F401 - defines torch.ops.slope_dist
from slope_dist.sparse.kernels.active import activate, active, active_on, using
from slope_dist.sparse.kernels.choice import Choice
from slope_dist.sparse.kernels.dispatch import Dispatcher
from slope_dist.sparse.kernels.problem import Problem
from slope_dist.sparse.kernels.store import ChoiceStore
from slope_dist.sparse.kernels.vendors import Vendors, find_vendors

__all__ = [
    "Choice",
    "ChoiceStore",
    "Dispatcher",
    "Problem",
    "Vendors",
    "activate",
    "active",
    "active_on",
    "find_vendors",
    "using",
]
