"""A loaded model laid out for a vendor's library gives the same logits, with its values where that library reads them.

On a CPU, by a vendor of plain torch; on a GPU `tests/sparse/kernels` has the real ones.

Run: pytest tests/inference/test_products.py (with -m "slow or not slow": every form with and without adapters)
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slope_dist.errors import UserError
from slope_dist.inference import InferenceModel
from slope_dist.inference.products import choices_file, prepare, start_products
from slope_dist.models import Decoding
from slope_dist.sparse import SparseWeight, kernels
from tests.export.models import random_stored
from tests.models.twins import VOCAB
from tests.sparse.kernels.vendors import PlainVendor, preferring, vendors

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("form", "adapters"),
    [
        ("opt", True),
        pytest.param("llama", False, marks=pytest.mark.slow),
        pytest.param("opt", False, marks=pytest.mark.slow),
        pytest.param("llama", True, marks=pytest.mark.slow),
    ],
)
def test_logits_are_the_same_in_place(form: str, adapters: bool) -> None:
    model = InferenceModel(random_stored(form, adapters=adapters))
    tokens = torch.randint(VOCAB, (2, 20))
    expected = model.logits(tokens)
    held = model.weight_bytes
    vendor = PlainVendor()
    dispatcher = kernels.Dispatcher(CPU, vendors(vendor), arrangement="in place", timer=preferring("plain/1"))
    with kernels.using(None):
        prepare(model.module, dispatcher, torch.float32)
        vendor.seen.clear()
        torch.testing.assert_close(model.logits(tokens), expected, rtol=1e-4, atol=1e-4)
        assert set(vendor.seen) == {"in place"}
        # Token by token, over keys and values that are kept.
        decoding = Decoding(torch.zeros(len(tokens), dtype=torch.int64), model.context)
        parts = [model.logits(tokens[:, i : i + 1], decoding) for i in range(5)]
        torch.testing.assert_close(torch.cat(parts, 1), expected[:, :5], rtol=1e-4, atol=1e-4)
    weights = [module for module in model.module.modules() if isinstance(module, SparseWeight)]
    assert weights
    for weight in weights:
        (metadata,) = weight.cached_tensors()
        assert metadata.data_ptr() == weight.values.data_ptr() + weight.values.nbytes
    assert model.weight_bytes == held


def test_without_a_gpu_nothing_is_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLOPE_DIST_KERNELS", str(tmp_path / "kernels.json"))
    model = InferenceModel(random_stored("opt"))
    assert model.dispatcher is None and start_products(model.module, CPU, torch.float32) is None
    assert choices_file() == tmp_path / "kernels.json" and not choices_file().exists()


def test_choices_are_kept_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SLOPE_DIST_KERNELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choices_file() == tmp_path / "slope_dist" / "kernels.json"


def test_where_choices_cannot_be_kept_another_place_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLOPE_DIST_KERNELS", str(tmp_path / "file" / "kernels.json"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    model = InferenceModel(random_stored("opt"))
    with pytest.raises(UserError, match=r"cannot be read: Not a directory; SLOPE_DIST_KERNELS names another file$"):
        start_products(model.module, torch.device("cuda"), torch.float32)
