"""The dispatcher that this process computes its 2:4 products with; none means the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from slope_dist.sparse.kernels.dispatch import Dispatcher

_active: Dispatcher | None = None


def active() -> Dispatcher | None:
    """The dispatcher in use."""
    return _active


def active_on(device: torch.device) -> Dispatcher | None:
    """The dispatcher in use, if it is for this device."""
    return _active if _active is not None and _active.device == device else None


def activate(dispatcher: Dispatcher | None) -> None:
    """Use a dispatcher from now on; None: the reference."""
    global _active
    _active = dispatcher


@contextmanager
def using(dispatcher: Dispatcher | None) -> Iterator[None]:
    """Use a dispatcher inside the block."""
    before = _active
    activate(dispatcher)
    try:
        yield
    finally:
        activate(before)
