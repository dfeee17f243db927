"""The cases of the layout matrix: which layouts, engines, patterns and precisions are held against one process.

All ways to place up to four ranks, and one of eight: tensor ranks 1, 2, 4; pipeline stages 1, 2, and 3 alone; data
ranks 1, 2, and 4 where there is no other axis; ZeRO 0 to 3 and FSDP2 (a pipeline: ZeRO 0 and 1, on DeepSpeed); sequence
parallelism on and off where there are tensor ranks; 2:4 and dense.

A short list runs in bf16. There, weights drift apart: sums are made in another order and rounded to 8 bits, and Adam
magnifies the rounding of elements that have hardly any gradient. Column masks, which follow from the weights, drift
with them. So bf16 is held to forward masks and samples bit for bit, losses, and the gradients of the first step, not to
the weights at the end, nor to the first gradients of the adapters, which join when the weights have drifted; and the
norms of gradients from then on to a wider bound than those before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import pi, sqrt
from typing import Any, Literal

from slope_dist.parallel.layout import Layout
from tests.runs import FIRST_ADAPTER_STEP, SECTIONS, STEPS

Engine = Literal["zero0", "zero1", "zero2", "zero3", "fsdp"]

GLOBAL_BATCH = SECTIONS["training"]["global_batch_size"]

CLIPPING = 0.25
"""Well below every gradient norm of these runs."""


@dataclass(frozen=True)
class Family:
    """A model family in the matrix.

    Attributes:
        model: what of the config's model section differs from `tests.runs.SECTIONS`.
        without_gradient: globs of parameters whose exact gradient is zero, so that what they get is rounding alone. A
            bias on the keys adds the same to all scores of a query, which the softmax ignores.
    """

    model: dict[str, Any]
    without_gradient: tuple[str, ...] = ()


# Three blocks: stages of two and of one. 515 rows of the table: padded wherever they are cut.
_SHAPE = {"num_layers": 3, "vocab_size": 515}

# Four tensor ranks take one key head and two query heads each.
_GROUPED = {"hidden_size": 64, "num_heads": 8, "num_kv_heads": 4, "ffn_size": 96}

FAMILIES = {
    "opt": Family(_SHAPE, ("*.k_proj.bias",)),
    "gpt2": Family(_SHAPE | {"family": "gpt2"}, ("*.k_proj.bias",)),
    "llama": Family(_SHAPE | _GROUPED | {"family": "llama", "rotary_scaling": 8.0, "rotary_original_length": 16}),
    "mistral": Family(_SHAPE | _GROUPED | {"family": "mistral", "rotary_base": 1e6}),
}


@dataclass(frozen=True)
class Bounds:
    """What a case may be off its control, relative; None: not looked at.

    Attributes:
        loss: of each step, and of the evaluation at the end.
        norm: of each step's gradient norm, while the adapters have not joined.
        later_norm: the same from then on.
        weight: norm of the difference of each logical weight after the last step.
        gradient: the same of each parameter's gradient in its first step.
        rounding: norm that the gradient of a parameter whose exact gradient is zero may have, of the whole norm.
        adapters: whether `gradient` is asked of the adapters too.
    """

    loss: float
    norm: float
    later_norm: float
    weight: float | None
    gradient: float
    rounding: float
    adapters: bool


_ROUNDING = 2.0**-9
"""The most by which a rounding to bf16 changes a number, relative: u."""

_ROUNDINGS = 20
"""Tensors of a token that are rounded on the way to the last block, in two runs that add in another order: r."""

# What a rounding changes directly is small beside what it changes by turning a ReLU on or off. Roundings are spread
# evenly up to u and independent, so two runs' inputs to a ReLU differ by d = sqrt(r / 3) u of their size; of two such
# normal numbers a share d / pi has other signs, among the half that is on 2 d / pi; each turns a term of the gradient
# on or off, which changes its norm by sqrt(2 d / pi) = 0.057. Twice that is allowed.
_RELU_GRADIENT = 2 * (2 * sqrt(_ROUNDINGS / 3) * _ROUNDING / pi) ** 0.5

BOUNDS = {
    "fp32": Bounds(loss=1e-5, norm=1e-4, later_norm=1e-4, weight=1e-5, gradient=1e-5, rounding=1e-6, adapters=True),
    "bf16": Bounds(
        loss=1e-3,
        norm=2 * _ROUNDING,
        # LLaMA's on two tensor ranks, whose partial sums are rounded once more, are off by 1e-3 before and 1e-2 then.
        later_norm=16 * _ROUNDING,
        weight=None,
        gradient=_RELU_GRADIENT,
        rounding=2 * _ROUNDING,
        adapters=False,
    ),
}


@dataclass(frozen=True)
class Case:
    """One run of the matrix."""

    layout: Layout
    engine: Engine
    sequence_parallel: bool = False
    family: str = "opt"
    pattern: str = "2:4"
    precision: str = "fp32"

    @property
    def name(self) -> str:
        """Such as "opt 2:4 fp32 tp2 pp1 dp2 zero3 sp"."""
        layout = self.layout
        parts = [self.family, self.pattern, self.precision]
        parts += [f"tp{layout.tensor}", f"pp{layout.pipeline}", f"dp{layout.data}", self.engine]
        return " ".join(parts + ["sp"] * self.sequence_parallel)

    @property
    def control(self) -> Case:
        """The single process it is held against. Stage 0 in bf16 would be run as stage 1 anyway."""
        stage: Engine = "zero0" if self.precision == "fp32" else "zero1"
        return Case(Layout(), stage, False, self.family, self.pattern, self.precision)

    @property
    def bounds(self) -> Bounds:
        """What it may be off its control."""
        return BOUNDS[self.precision]

    @property
    def changes(self) -> dict[str, Any]:
        """What its config differs in from `tests.runs.SECTIONS`, as `write_config` takes it."""
        layout = self.layout
        # Every run accumulates; a pipeline has more micro-batches than stages.
        accumulation = 4 if layout.pipeline > 1 else 2
        changes: dict[str, Any] = {f"model__{key}": value for key, value in FAMILIES[self.family].model.items()}
        changes |= {
            "training__gradient_clipping": CLIPPING,
            "training__micro_batch_size": GLOBAL_BATCH // (accumulation * layout.data),
            "sparsity__pattern": self.pattern,
            "precision": self.precision,
            "parallel__tensor": layout.tensor,
            "parallel__pipeline": layout.pipeline,
            "parallel__data": layout.data,
            "parallel__sequence_parallel": self.sequence_parallel,
            # Every step is saved: the first moments after a parameter's first step are (1 - beta1) x its gradient.
            "checkpoint__interval": 1,
            "checkpoint__keep": STEPS,
        }
        if self.engine == "fsdp":
            return changes | {"parallel__engine": "fsdp"}
        return changes | {"parallel__zero_stage": int(self.engine[-1])}

    @property
    def first_adapter_step(self) -> int | None:
        """Where the adapters join; None in dense mode, which has none."""
        return None if self.pattern == "dense" else FIRST_ADAPTER_STEP


def _layouts() -> Iterator[tuple[Layout, Engine, bool]]:
    for pipeline in (1, 2):
        engines: tuple[Engine, ...] = ("zero0", "zero1")
        if pipeline == 1:
            engines += ("zero2", "zero3", "fsdp")
        for tensor in (1, 2, 4):
            for data in (1, 2, 4):
                layout = Layout(tensor, data, pipeline)
                if layout.world_size > 4:
                    continue
                for engine in engines:
                    for sequence_parallel in (False, True) if tensor > 1 else (False,):
                        yield layout, engine, sequence_parallel
    # A stage that is neither the first nor the last.
    yield Layout(pipeline=3), "zero0", False
    yield Layout(pipeline=3), "zero1", False
    yield Layout(tensor=2, data=2, pipeline=2), "zero1", True


def matrix(family: str = "opt") -> list[Case]:
    """All cases of a family, fewest ranks first within each pattern and precision, without the controls."""
    cases = [
        Case(layout, engine, sequence_parallel, family, pattern)
        for pattern in ("2:4", "dense")
        for layout, engine, sequence_parallel in sorted(_layouts(), key=lambda item: item[0].world_size)
    ]
    bf16: list[tuple[Layout, Engine, bool]] = [
        (Layout(data=2), "zero1", False),
        (Layout(data=2), "zero2", False),
        (Layout(data=2), "zero3", False),
        (Layout(data=2), "fsdp", False),
        (Layout(tensor=2), "zero1", False),
        (Layout(tensor=2), "zero1", True),
        (Layout(pipeline=2), "zero1", False),
        (Layout(tensor=4), "zero2", True),
        (Layout(tensor=2, data=2), "zero3", True),
        (Layout(tensor=2, data=2), "fsdp", True),
        (Layout(tensor=2, pipeline=2), "zero1", True),
        (Layout(data=2, pipeline=2), "zero1", False),
    ]
    cases += [Case(*where, family=family, precision="bf16") for where in bf16]
    return [case for case in cases if case != case.control]


def all_cases() -> list[Case]:
    """The matrix of every family."""
    return [case for family in FAMILIES for case in matrix(family)]


QUICK = (
    Case(Layout(tensor=2, data=2), "fsdp", True, family="llama"),
    Case(Layout(tensor=2, pipeline=2), "zero1", True),
    Case(Layout(data=2, pipeline=2), "zero0", family="gpt2", pattern="dense"),
)
"""The cases most likely to tell: each axis with each other one, FSDP2 and the pipeline, dense once, three families.

ZeRO 3 with tensor ranks is in tests/engine/test_tensor_parallel.py.
"""
