"""torch's CUDA operators and collectives computed on the CPU, in place, as a card's memory is memory of the host here.

What is computed has the numbers of the CPU's kernels: a rehearsal is of programs, not of arithmetic.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
LEFT = {
    "_fused_sdp_choice", "_local_scalar_dense", "_pin_memory", "_reshape_alias", "alias", "as_strided", "empty",
    "empty_strided", "is_pinned", "is_set_to", "record_stream", "resize_", "set_", "unfold", "view",
    "view_as_complex", "view_as_real",
}  # fmt: skip
"""Operators that touch no entries of a tensor, and so run as they are."""

LEFT_FAMILIES = ("_cslt", "_cudnn", "_sparse", "cudnn", "miopen")
BACKENDS = "cpu:gloo,cuda:gloo"

_libraries: list[Any] = []
_generators: dict[tuple[int, int], torch.Generator] = {}


def on_host(tensor: Tensor) -> Tensor:
    """A tensor of the CPU over the same memory."""
    storage = tensor.untyped_storage()
    made = torch.empty(0, dtype=tensor.dtype)
    if storage.nbytes() == 0:
        return made.as_strided(tensor.shape, tensor.stride()) if tensor.numel() == 0 else made
    same = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), CPU, storage.nbytes())
    return made.set_(same, tensor.storage_offset(), tensor.shape, tensor.stride())


def on_card(result: Tensor, device: torch.device) -> Tensor:
    """A copy on a card, with the same strides."""
    made = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device=device)
    if result.numel():
        on_host(made).copy_(result)
    return made


def _generator(given: torch.Generator) -> torch.Generator:
    """The CPU's generator that goes with a card's."""
    if given.device.type == "cpu":
        return given
    key = (id(given), given.initial_seed())
    if key not in _generators:
        _generators[key] = torch.Generator().manual_seed(given.initial_seed())
    return _generators[key]


def _as_tensor(value: Any, others: tuple[Any, ...]) -> Tensor:
    """A number that stands where the operator wants a tensor, of no wider kind than the tensors beside it."""
    if isinstance(value, int):
        return torch.tensor(value)
    wide = any(isinstance(other, Tensor) and other.dtype == torch.float64 for other in others)
    return torch.tensor(value, dtype=torch.float64 if wide else torch.float32)


def computed_on_host(operator: Any) -> Callable[..., Any]:
    """The CUDA kernel of an operator: its CPU kernel."""
    wanted = [str(argument.type) for argument in operator._schema.arguments]
    compute = SPECIAL.get(operator.name(), operator)

    def run(*args: Any, **kwargs: Any) -> Any:
        pairs: list[tuple[Tensor, Tensor]] = []
        device: torch.device | None = None

        def down(value: Any) -> Any:
            nonlocal device
            if isinstance(value, Tensor) and value.is_cuda:
                device = value.device
                pairs.append((on_host(value), value))
                return pairs[-1][0]
            if isinstance(value, torch.device) and value.type == "cuda":
                device = value
                return CPU
            return _generator(value) if isinstance(value, torch.Generator) else value

        host_args, host_kwargs = tree_map(down, (args, kwargs))
        host_args = [
            _as_tensor(value, host_args) if kind == "Tensor" and isinstance(value, int | float) else value
            for value, kind in zip(host_args, wanted, strict=False)
        ]
        if device is None or device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())

        def up(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.device != CPU:
                return value
            card = next((card for host, card in pairs if host is value), None)
            return on_card(value, device) if card is None else card

        with torch.cuda.device(device):
            before = [(host.shape, host.stride()) for host, _ in pairs]
            result = compute(*host_args, **host_kwargs)
            for (host, card), (shape, stride) in zip(pairs, before, strict=True):
                # An `out` that was too small: it lies elsewhere now.
                if host.shape != shape or host.stride() != stride:
                    card.resize_(host.shape).as_strided_(host.shape, host.stride())
                    on_host(card).copy_(host)
            return tree_map(up, result)

    return run


def collective_on_host(operator: Any) -> Callable[..., Any]:
    """A collective over cards: gloo's over the same memory. All but sends and receives have ended when it returns."""
    one_sided = "send" in operator.name() or "recv" in operator.name()

    def run(*args: Any, **kwargs: Any) -> Any:
        down = functools.partial(tree_map, lambda v: on_host(v) if isinstance(v, Tensor) and v.is_cuda else v)
        result = operator(*down(args), **down(kwargs))
        for value in [] if one_sided else tree_leaves(result):
            if not isinstance(value, Tensor) and hasattr(value, "wait"):
                value.wait()
        return result

    return run


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    scores = q.float() @ k.float().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias.float()
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return scores


def _attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp; heads of keys and values are shared by groups of query heads."""
    group = q.shape[1] // k.shape[1]
    scores = _scores(q, k.repeat_interleave(group, 1), bias, causal, scale)
    out = scores.softmax(-1) @ v.float().repeat_interleave(group, 1)
    # As the kernels lay it out: heads of one token side by side.
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), scores.logsumexp(-1)


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    keys, values = (each.float().repeat_interleave(group, 1) for each in (k, v))
    weights = _scores(q, keys, None, causal, scale).softmax(-1)
    upstream = grad.float() @ values.transpose(-1, -2)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = weights * (upstream - (upstream * weights).sum(-1, keepdim=True)) * factor

    def summed(each: Tensor) -> Tensor:
        return each.unflatten(1, (k.shape[1], group)).sum(2).to(k.dtype)

    grad_k = scores.transpose(-1, -2) @ q.float()
    return (scores @ keys).to(q.dtype), summed(grad_k), summed(weights.transpose(-1, -2) @ grad.float())


def _flash(q, k, v, dropout=0.0, causal=False, debug=False, *, scale=None, bias=None):  # type: ignore[no-untyped-def]
    assert not dropout
    out, lse = _attention(q, k, v, bias, causal, scale)
    return out, lse, None, None, q.shape[2], k.shape[2], torch.zeros(2, dtype=torch.uint64), torch.zeros(()), out[:0]


def _cudnn(q, k, v, bias, lse, dropout=0.0, causal=False, debug=False, *, scale=None):  # type: ignore[no-untyped-def]
    return _flash(q, k, v, dropout, causal, scale=scale, bias=bias)


def _efficient(q, k, v, bias, lse, dropout=0.0, causal=False, *, scale=None):  # type: ignore[no-untyped-def]
    out, lse, *_ = _flash(q, k, v, dropout, causal, scale=scale, bias=bias)
    return out, lse, torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)


def _flash_backward(  # type: ignore[no-untyped-def]
    grad, q, k, v, out, lse, cq, ck, mq, mk, dropout, causal, seed, offset, *, scale=None
):
    return _attention_backward(grad, q, k, v, causal, scale)


def _cudnn_backward(  # type: ignore[no-untyped-def]
    grad, q, k, v, out, lse, seed, offset, bias, cq, ck, mq, mk, dropout, causal, *, scale=None
):
    return _attention_backward(grad, q, k, v, causal, scale)


def _efficient_backward(  # type: ignore[no-untyped-def]
    grad, q, k, v, bias, out, lse, seed, offset, dropout, mask, causal=False, *, scale=None
):
    return *_attention_backward(grad, q, k, v, causal, scale), None


def _rms_norm(x, shape, weight, epsilon):  # type: ignore[no-untyped-def]
    epsilon = torch.finfo(x.dtype).eps if epsilon is None else epsilon
    inverse = (x.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
    y = x.float() * inverse
    return (y if weight is None else y * weight.float()).to(x.dtype), inverse


def _rms_norm_backward(grad, x, shape, inverse, weight, mask):  # type: ignore[no-untyped-def]
    y = x.float() * inverse
    inner = grad.float() if weight is None else grad.float() * weight.float()
    grad_x = (inner - y * (inner * y).mean(-1, keepdim=True)) * inverse
    grad_weight = None if weight is None else (grad.float() * y).flatten(0, -2).sum(0).to(weight.dtype)
    return grad_x.to(x.dtype), grad_weight


SPECIAL: dict[str, Callable[..., Any]] = {
    "aten::_scaled_dot_product_flash_attention": _flash,
    "aten::_scaled_dot_product_flash_attention_backward": _flash_backward,
    "aten::_scaled_dot_product_cudnn_attention": _cudnn,
    "aten::_scaled_dot_product_cudnn_attention_backward": _cudnn_backward,
    "aten::_scaled_dot_product_efficient_attention": _efficient,
    "aten::_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "aten::_fused_rms_norm": _rms_norm,
    "aten::_fused_rms_norm_backward": _rms_norm_backward,
}
"""Operators that the CPU has no kernel for, or one with other arguments."""


def _number(tensor: Tensor) -> Any:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("an entry of a tensor is read while a CUDA graph is captured")
    return on_host(tensor).item()


def _averaged(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reduction that knows the average, which is nccl's alone."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "AVG" not in str(kwargs.get("op")):
            return function(*args, **kwargs)
        work = function(*args, **kwargs | {"op": dist.ReduceOp.SUM})
        (args[0] if args else kwargs.get("output", kwargs.get("tensor"))).div_(dist.get_world_size(kwargs.get("group")))
        return work

    return call


def _by_gloo(function: Callable[..., Any], place: int) -> Callable[..., Any]:
    """What makes a process group: with gloo on cards where it would be nccl."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(enumerate(args)) | kwargs
        key = place if place in given else "backend"
        if given.get(key) in ("nccl", None):
            given[key] = BACKENDS
        given.pop("device_id", None)
        return function(
            *(given[index] for index in range(len(args))),
            **{name: value for name, value in given.items() if isinstance(name, str)},
        )

    return call


def _replace(name: str, made: Callable[..., Any]) -> None:
    for module in (dist, distributed_c10d):
        setattr(module, name, made)


def _without_triton(primitives: Any) -> None:
    # It compiles for cards; `make test` runs its kernels by its interpreter.
    primitives.why_no_triton = lambda device_type: "this is a rehearsal"


def _probe_less(stragglers: Any) -> None:
    # What a card does in a millisecond takes a CPU half a minute.
    stragglers.Probe.PRODUCTS = stragglers.Probe.PRODUCTS | {"cuda": 1}


CHANGED = {
    "slope_dist.sparse.kernels.primitives": _without_triton,
    "slope_dist.comparing.stragglers": _probe_less,
}
"""What becomes of a module once it is imported."""


class _Changer(importlib.abc.MetaPathFinder):
    searching = False

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in CHANGED or self.searching:
            return None
        self.searching = True
        spec = importlib.util.find_spec(name)
        self.searching = False
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_change(module: Any) -> None:
            load(module)
            CHANGED[name](module)

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Replace the operators, the collectives and what chooses between them, for this process."""
    aten, c10d = torch.library.Library("aten", "IMPL"), torch.library.Library("c10d", "IMPL")
    _libraries.extend((aten, c10d))
    with warnings.catch_warnings():
        # Each is said to be overridden.
        warnings.simplefilter("ignore")
        aten.impl("_local_scalar_dense", _number, "CUDA")
        for full in [*torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"), "aten::copy_"]:
            space, _, name = full.partition("::")
            base, _, overload = name.partition(".")
            if space not in ("aten", "c10d") or base in LEFT or base.startswith(LEFT_FAMILIES):
                continue
            operator = getattr(getattr(getattr(torch.ops, space), base), overload or "default", None)
            if operator is not None:
                make, library = (computed_on_host, aten) if space == "aten" else (collective_on_host, c10d)
                library.impl(full, make(operator), "CUDA")
    for name, place in (("init_process_group", 0), ("new_group", 2)):
        _replace(name, _by_gloo(getattr(distributed_c10d, name), place))
    for name in ("all_reduce", "reduce_scatter_tensor", "reduce_scatter"):
        _replace(name, _averaged(getattr(distributed_c10d, name)))
    named = distributed_c10d.get_backend
    # Whoever asks is to do what is done with cards.
    _replace("get_backend", lambda group=None: "gloo" if named(group) == "gloo" else "nccl")
    sys.meta_path.insert(0, _Changer())
