"""The vendor libraries that multiply 2:4 weights on this machine's device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from slope_dist.sparse.kernels.vendor import VendorError, VendorRoute

NAMES = ("cusparselt", "cutlass")


@dataclass(frozen=True)
class Vendors:
    """Libraries that were found, and why others were not."""

    routes: tuple[VendorRoute, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def versions(self) -> dict[str, str]:
        """Version by name."""
        return {route.name: route.version for route in self.routes}


def find_vendors(device: torch.device, names: Sequence[str] = NAMES) -> Vendors:
    """Open the libraries called `names` for a device; cutlass is compiled when it is first asked for a product."""
    routes, missing = [], {}
    for name in names:
        try:
            routes.append(_open(name, device))
        except VendorError as error:
            missing[name] = str(error)
    return Vendors(tuple(routes), missing)


def _open(name: str, device: torch.device) -> VendorRoute:
    if device.type != "cuda":
        raise VendorError("it needs a CUDA device")
    if name == "cusparselt":
        from slope_dist.sparse.kernels.cusparselt.route import CusparseltRoute

        return CusparseltRoute(device)
    assert name == "cutlass"
    from slope_dist.sparse.kernels.cutlass.route import CutlassRoute

    return CutlassRoute(device)
