"""Bytes of tensors counted as they are allocated and freed, by storage: views count once, and for as long as one lives.

Of real tensors and of fake ones alike: a prediction is made, and checked, by the same count.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class StorageCounter(TorchDispatchMode):
    """Counts the storages that operations in its block make.

    What a kernel takes and frees inside itself is not seen; nor, until the next operation on it, a storage that was
    resized without one.

    Attributes:
        bytes: of all that are alive now.
        peak: the most since the beginning, or since `restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        # By the storage's address in C++, under which a new one may be found when the old one is gone.
        self._sizes: dict[int, int] = {}
        self._ignored: set[int] = set()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave out the storages of these, which must outlive the count."""
        self._ignored |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def restart(self) -> None:
        """Begin a new peak."""
        self.peak = self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it took and gave."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            # What is on the meta device takes no memory (fake tensors say they are elsewhere), and a tensor that wraps
            # others, as FSDP's do, takes theirs.
            if isinstance(leaf, Tensor) and leaf.device.type != "meta" and not is_traceable_wrapper_subclass(leaf):
                self.look(leaf.untyped_storage())
        return result

    def look(self, storage: torch.UntypedStorage) -> None:
        """Take note of a storage's size as it is now."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._ignored:
            return
        before = self._sizes.get(key)
        if before is None:
            weakref.finalize(storage, self._forget, key)
        if before != size:
            self._sizes[key] = size
            self.bytes += size - (before or 0)
            self.peak = max(self.peak, self.bytes)

    def _forget(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key, 0)
