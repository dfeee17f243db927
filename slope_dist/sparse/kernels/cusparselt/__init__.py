"""2:4 products by NVIDIA's cuSPARSELt, through ctypes.

Tested against a stand-in with the library's interface, which checks calls, arguments and numbers on the CPU; not yet
proven on a card.
"""

from slope_dist.sparse.kernels.cusparselt.plan import Algorithm
from slope_dist.sparse.kernels.cusparselt.route import STANDING, CusparseltRoute

__all__ = ["STANDING", "Algorithm", "CusparseltRoute"]
