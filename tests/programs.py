"""The programs in tools/, which lie beside the package and not in it, as modules of a test's own process."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from tests.distributed import ROOT


def program(name: str) -> ModuleType:
    """tools/`name`.py, imported anew."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
