"""Which way each product is computed: measured once for a card, dtype, shape and number of tokens, then kept.

A candidate is taken only if it has been seen to give what the reference gives, and then only for its speed: the weight
is expanded for a dense product wherever nothing sparse is faster.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from slope_dist.errors import UnfinishedError, UserError
from slope_dist.sparse.kernels import candidates as ways
from slope_dist.sparse.kernels import judging, measuring, primitives
from slope_dist.sparse.kernels.candidates import Candidate, Operands
from slope_dist.sparse.kernels.choice import NOT_DETERMINISTIC, Choice
from slope_dist.sparse.kernels.failures import CRASHED, breaks_device, reason_of
from slope_dist.sparse.kernels.problem import Kind, Problem
from slope_dist.sparse.kernels.store import ChoiceStore
from slope_dist.sparse.kernels.vendor import NO_MEMORY, VendorError, VendorRoute, on
from slope_dist.sparse.kernels.vendors import Vendors

Arrangement: TypeAlias = Literal["in place", "kept", "derived"]
"""How a vendor's library comes by a weight: values and its metadata lie in one buffer of its own; its metadata is kept
with the weight, whose values lie elsewhere; or it is made of ours for every product, since the weight is sharded."""

ReadyKey: TypeAlias = tuple[Kind, int, int, int, torch.dtype]


class Dispatcher:
    """Computes 2:4 products on one device, each in the way that was fastest.

    What was not warmed up is measured when it is first asked for; not once it is settled, not while a CUDA graph is
    being captured, and not in deterministic mode, where a time must not decide what the bits are: the weight is then
    expanded.

    Args:
        device: of all operands.
        vendors: libraries to choose from.
        store: choices of earlier processes, and where to write new ones.
        arrangement: how the weights lie, which is part of what is measured.
        deterministic: only what always gives the same bits.
        timer: measures calls.
    """

    def __init__(
        self,
        device: torch.device,
        vendors: Vendors | None = None,
        store: ChoiceStore | None = None,
        *,
        arrangement: Arrangement = "kept",
        deterministic: bool = False,
        timer: measuring.Timer = measuring.median_seconds,
    ) -> None:
        self.device = device
        self.vendors = vendors or Vendors()
        self.arrangement = arrangement
        self.deterministic = deterministic
        self._timer = timer
        self._settled = False
        self._store = store
        self._stored = {} if store is None else store.choices(self.setting)
        self._crashed = {} if store is None else store.crashed(self.setting)
        if store is not None:
            self._take_findings(store.findings(self._machine))
        self._choices: dict[tuple[Kind, Problem], Choice] = {}
        self._ready: dict[ReadyKey, Candidate] = {}
        self._forms: dict[tuple[int, int, torch.dtype], str] = {}
        self._refused: set[tuple[Kind, Problem, bool]] = set()

    @property
    def setting(self) -> str:
        """What a measurement depends on besides the problem: card, versions, and how this dispatcher measures."""
        return f"{self._machine}; {self.arrangement}{', deterministic' if self.deterministic else ''}"

    @property
    def _machine(self) -> str:
        """Card and versions."""
        card = platform.processor() or platform.machine()
        if self.device.type == "cuda":
            card = torch.cuda.get_device_name(self.device)
        versions = {name: _version(name) for name in ("slope_dist", "torch", "triton")} | self.vendors.versions
        return f"{card}; {', '.join(f'{name} {text}' for name, text in versions.items())}"

    def product(self, operands: Operands) -> Tensor:
        """Y [T, O] = X W^T (+ bias) (+ addend)."""
        return self._run("product", operands)

    def input_gradient(self, operands: Operands) -> Tensor:
        """dX [T, I] = dY W^{R,C}, `operands.x` being dY [T, O]."""
        return self._run("input gradient", operands)

    def product_with_adapter(self, operands: Operands, down: Tensor, up: Tensor, scale: float) -> Tensor:
        """Y = X W^T + (scale X down^T) up^T (+ bias), in one kernel for few tokens: down [R, I], up [O, R]."""
        candidate = self._candidate("product", operands)
        if candidate.route == "decode":
            from slope_dist.sparse.kernels.jit.decode import decode

            x, values, indices = operands.x, operands.values, operands.indices
            return decode(x, values, indices, bias=operands.bias, down=down, up=up, scale=scale)
        addend = functional.linear(functional.linear(operands.x, down) * scale, up)
        return self._run("product", replace(operands, addend=addend))

    def metadata(self, indices: Tensor, dtype: torch.dtype) -> tuple[str, Tensor] | None:
        """A vendor's metadata for a weight, in the form that its products were seen to want; None: none is wanted."""
        form = self.form(indices, dtype)
        if not form:
            return None
        vendor, tiles = self._vendor_of(form)
        try:
            return form, ways.metadata_of(vendor, tiles, indices, dtype)
        except VendorError:
            # It keeps them in a way of its own, and makes them for every product.
            return None

    def form(self, indices: Tensor, dtype: torch.dtype) -> str:
        """The form of metadata that products over a weight want: of the choice for the most tokens."""
        if self.arrangement == "derived":
            return ""
        rows, columns = indices.shape[0], indices.shape[1] * 8
        return self._forms.get((rows, columns, dtype), "")

    def lay(self, values: Tensor, indices: Tensor) -> tuple[Tensor, tuple[str, Tensor] | None]:
        """Values and the metadata of their vendor, in one buffer if that is the arrangement: the values, and metadata.

        A weight of several tiles is left as it is: a tile's values and metadata would lie between those of others.
        """
        metadata = self.metadata(indices, values.dtype)
        if metadata is None or self.arrangement != "in place" or not metadata[0].endswith("/1"):
            return values, metadata
        head = values.nbytes
        buffer = torch.empty(head + metadata[1].nbytes, dtype=torch.uint8, device=values.device)
        laid = buffer[:head].view(values.dtype).view(values.shape)
        laid.copy_(values)
        buffer[head:].copy_(metadata[1])
        return laid, (metadata[0], buffer[head:])

    def lay_transpose(
        self, values: Tensor, indices: Tensor, column_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[str, Tensor] | None]:
        """(W^{R,C})^T of a weight, as products over it want it: values, indices, and the metadata of their vendor.

        The values are nobody else's, unlike a weight's, so in every arrangement they lie where the vendor reads them.
        """
        rows, columns = indices.shape[0], indices.shape[1] * 8
        form = "" if self.arrangement == "derived" else self._forms.get((columns, rows, values.dtype), "")
        if not form.endswith("/1"):
            transposed, packed = primitives.transpose(values, indices, column_mask)
            return transposed, packed, self.metadata(packed, values.dtype)
        vendor, _ = self._vendor_of(form)
        transposed, packed, metadata = ways.transpose_for(vendor, values, indices, column_mask)
        return transposed, packed, None if metadata is None else (form, metadata)

    def _vendor_of(self, form: str) -> tuple[VendorRoute, int]:
        """The library that reads a form of metadata, and of how many tiles it is."""
        name, _, tiles = form.rpartition("/")
        return next(route for route in self.vendors.routes if route.name == name), int(tiles)

    def product_choice(self, problem: Problem) -> Choice:
        """How a product is computed; measured now if it never was."""
        return self._choice("product", problem)

    def input_gradient_choice(self, problem: Problem) -> Choice:
        """How dX is computed from W^R [O, I] alone; measured now if it never was."""
        return self._choice("input gradient", problem)

    def warm_up(self, uses: Iterable[tuple[Kind, Problem]]) -> None:
        """Measure what is going to be asked for."""
        for kind, problem in uses:
            self._choice(kind, problem)

    def settle(self) -> None:
        """Measure nothing from now on: for ranks that must choose alike, or have no memory to spare."""
        self._settled = True

    def as_data(self) -> dict[str, dict[str, Any]]:
        """All choices as plain data, for `adopt` on another rank with the same card."""
        return {_key(kind, problem): choice.as_data() for (kind, problem), choice in self._choices.items()}

    def findings(self) -> dict[str, dict[str, bool | None]]:
        """What long trials of the device have told, by library: plain data, for `adopt` too."""
        return {route.name: dict(route.findings) for route in self.vendors.routes}

    def adopt(self, data: dict[str, dict[str, Any]], findings: dict[str, dict[str, bool | None]]) -> None:
        """Take over choices and findings that another process has made in the same setting."""
        self._stored |= data
        self._take_findings(findings)

    def _take_findings(self, findings: Mapping[str, Mapping[str, bool | None]]) -> None:
        for route in self.vendors.routes:
            route.findings.update(findings.get(route.name, {}))

    def report(self) -> list[str]:
        """What was chosen and why, a line each."""
        lines = [f"2:4 products of {self.setting}"]
        lines += [f"{route.name} {route.version}: {route.standing}" for route in self.vendors.routes if route.standing]
        lines += [f"without {name}: {reason}" for name, reason in self.vendors.missing.items()]
        without_triton = primitives.why_no_triton(self.device.type)
        if without_triton is not None:
            lines.append(f"without Triton: {without_triton}; plain torch expands and transposes")
        problems = [problem for kind, problem in self._choices if kind == "product"]
        refused = (item for problem in problems for item in ways.refusals(problem, self.vendors).items())
        lines += dict.fromkeys(f"without {form}: {reason}" for form, reason in refused)
        for (kind, problem), choice in self._choices.items():
            lines.append(f"{kind} {problem}: {choice.label}, {choice.why}{choice.failed}")
            lines += [
                f"{kind} {problem}: {label} is never tried again: it {reason}"
                for label, reason in choice.rejected.items()
                if reason.startswith(CRASHED)
            ]
        return lines

    def _run(self, kind: Kind, operands: Operands) -> Tensor:
        candidate = self._candidate(kind, operands)
        try:
            return candidate.run(operands)
        except VendorError as error:
            return self._run_otherwise(kind, operands, candidate, error)

    def _run_otherwise(self, kind: Kind, operands: Operands, candidate: Candidate, error: VendorError) -> Tensor:
        """Expand what a library has refused after all, from now on: it was tried with another number of tokens.

        Raises:
            VendorError: where that would be no help, or would hide why the bits of a run are others.
        """
        # The device cannot be asked how it is in a capture, whose graph is lost anyway.
        if self.deterministic or _capturing(self.device) or breaks_device(error, self.device):
            raise error
        problem, reason = _problem(operands), reason_of(error)
        passing = reason.startswith(NO_MEMORY)
        how_long = "this time" if passing else "from now on"
        text = f"{candidate.label} refuses {kind} {problem}, which is expanded {how_long}: {reason}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        if not passing:
            self._refused.add(self._chosen_by(kind, problem))
            self._ready.clear()
        return _expand(kind).run(operands)

    def _chosen_by(self, kind: Kind, problem: Problem) -> tuple[Kind, Problem, bool]:
        """The problem whose choice counts for this one, and whether it is this one: fewer tokens may be refused."""
        if (kind, problem) in self._choices:
            return kind, problem, True
        return kind, replace(problem, tokens=round_tokens(problem.tokens)), False

    def _candidate(self, kind: Kind, operands: Operands) -> Candidate:
        key = _ready_key(kind, operands)
        ready = self._ready.get(key)
        if ready is None:
            # Nothing there to be timed, and no library takes it.
            ready = self._find(kind, _problem(operands)) if operands.x.shape[0] else None
            if ready is None:
                return _expand(kind)
            self._ready[key] = ready
        return ready

    def _find(self, kind: Kind, problem: Problem) -> Candidate | None:
        """The way to compute a problem, by measurement where that is allowed; None: not known, and it is not."""
        rounded = replace(problem, tokens=round_tokens(problem.tokens))
        if self._refused and self._chosen_by(kind, problem) in self._refused:
            return None
        # Asking libraries what they support waits for the device, which ends a capture.
        capturing = _capturing(self.device)
        for known in (problem, rounded):
            choice = self._choices.get((kind, known)) if capturing else self._known(kind, known)
            if choice is not None:
                return choice.candidate if capturing else self._readable(kind, known, choice)
        if self.deterministic or self._settled or capturing:
            return None
        return self._readable(kind, rounded, self._choice(kind, rounded))

    def _readable(self, kind: Kind, problem: Problem, choice: Choice) -> Candidate:
        """The fastest way of a choice that reads the metadata which the weight has, if it has any.

        Another form would be made anew for every product, which is not what was measured.
        """
        form = self._forms.get((problem.rows, problem.columns, problem.dtype), "")
        if self.arrangement == "derived" or choice.candidate.form in ("", form):
            return choice.candidate
        right = [way for way in self.candidates(kind, problem) if way.label in choice.seconds]
        return min((way for way in right if way.form in ("", form)), key=lambda way: choice.seconds[way.label])

    def _choice(self, kind: Kind, problem: Problem) -> Choice:
        choice = self._known(kind, problem)
        if choice is None:
            # Events and streams are those of the current device.
            with on(self.device):
                choice = self._measure(kind, problem)
            self._keep(kind, problem, choice)
            if self._store is not None and not self._passing(problem, choice):
                self._store.add(self.setting, {_key(kind, problem): choice.as_data()})
        return choice

    def _passing(self, problem: Problem, choice: Choice) -> bool:
        """Whether a choice went without something for want of memory, and so is this process's alone.

        In deterministic mode it is not: a run that goes on must have the same bits, whatever memory there is.
        """
        reasons = (*choice.rejected.values(), *ways.refusals(problem, self.vendors).values())
        return not self.deterministic and any(reason.startswith(NO_MEMORY) for reason in reasons)

    def _known(self, kind: Kind, problem: Problem) -> Choice | None:
        choice = self._choices.get((kind, problem))
        data = self._stored.get(_key(kind, problem))
        if choice is None and data is not None:
            found = [c for c in self.candidates(kind, problem) if c.label == data["label"]]
            if found:
                choice = Choice(found[0], data["seconds"], data["dense_seconds"], data["rejected"])
                self._keep(kind, problem, choice)
        return choice

    def _keep(self, kind: Kind, problem: Problem, choice: Choice) -> None:
        self._choices[kind, problem] = choice
        # A form that one number of tokens wants may replace another's.
        weight = (problem.rows, problem.columns, problem.dtype)
        same = [
            (p.tokens, c.candidate.form)
            for (of, p), c in self._choices.items()
            if of == "product" and (p.rows, p.columns, p.dtype) == weight and c.candidate.form
        ]
        if same and self._forms.get(weight) != max(same)[1]:
            self._forms[weight] = max(same)[1]
            self._ready.clear()

    def candidates(self, kind: Kind, problem: Problem) -> Sequence[Candidate]:
        """Every way to compute a problem, right or not."""
        if kind == "product":
            decode = primitives.why_no_triton(self.device.type) is None
            return list(ways.candidates(problem, self.vendors, decode=decode))
        over_transpose = self._find("product", problem.transposed()) or ways.EXPAND
        return list(ways.input_gradient_candidates(problem, over_transpose, self.vendors))

    def _measure(self, kind: Kind, problem: Problem) -> Choice:
        operands, dense, expected = judging.sample(kind, problem)
        right: dict[str, Candidate] = {}
        # By form, whose algorithms share them: each set of operands "in place" is another copy of the weight.
        laid: dict[str, Operands] = {}
        rejected: dict[str, str] = {}
        found = self.candidates(kind, problem)
        if self._store is not None:
            # Before anything runs that may end this process: a trial takes up to minutes.
            self._store.add_findings(self._machine, self.findings())
        for candidate in found:
            if self.deterministic and not candidate.deterministic:
                rejected[candidate.label] = NOT_DETERMINISTIC
                continue
            crashed = self._crashed.get(_key(kind, problem), {}).get(candidate.label)
            if crashed is not None:
                rejected[candidate.label] = crashed
                continue
            wrong = self._judge(judging.why_wrong, kind, problem, candidate, operands, laid, expected)
            if wrong is None:
                right[candidate.label] = candidate
            else:
                rejected[candidate.label] = wrong
        calls: dict[str, Any] = {name: partial(way.run, laid[way.form]) for name, way in right.items()}
        calls[measuring.DENSE] = lambda: dense(operands.x)
        seconds = self._timer(calls, self.device, problem.tokens <= ways.MOST_DECODED_TOKENS)
        dense_seconds = seconds.pop(measuring.DENSE)
        # Of a library's dozens only those that may be used: the fastest that passes, of each form of metadata.
        passed: dict[str, Candidate] = {}
        for label in sorted(seconds, key=lambda name: seconds[name]):
            candidate = right[label]
            if candidate.form in passed:
                continue
            wrong = self._judge(judging.why_wrong_in_use, kind, problem, candidate, operands, laid, expected)
            if wrong is None:
                passed[candidate.form] = candidate
            else:
                rejected[label] = wrong
                del seconds[label]
        if not passed:
            raise RuntimeError(f"{kind} {problem}: not even the expanded product is right: {rejected}")
        best = min(passed.values(), key=lambda candidate: seconds[candidate.label])
        return Choice(best, seconds, dense_seconds, rejected)

    def _judge(
        self,
        look: judging.Look,
        kind: Kind,
        problem: Problem,
        candidate: Candidate,
        operands: Operands,
        laid: dict[str, Operands],
        expected: Tensor,
    ) -> str | None:
        """Why a candidate is to be left out, by a closer look, for which its operands are laid; None: it is not.

        Raises:
            UnfinishedError: nothing runs on the device any more.
        """
        try:
            with self._trying(kind, problem, candidate):
                if candidate.form not in laid:
                    laid[candidate.form] = self.given(candidate, operands)
                return look(kind, candidate, laid[candidate.form], expected)
        except (AssertionError, UserError):
            raise
        except Exception as error:
            # Of a compiler, a driver or the allocator, each with kinds of its own: other ways are left, and the
            # report says so.
            reason = reason_of(error)
            if breaks_device(error, self.device):
                raise self._broken(kind, problem, candidate, reason) from error
            return reason

    def _trying(self, kind: Kind, problem: Problem, candidate: Candidate) -> AbstractContextManager[None]:
        """Mark a library's way while it first runs; the expanded product is left when all else is gone."""
        if self._store is None or candidate.route == "expand":
            return nullcontext()
        return self._store.trying(self.setting, _key(kind, problem), candidate.label)

    def _broken(self, kind: Kind, problem: Problem, candidate: Candidate, reason: str) -> UnfinishedError:
        """What a candidate has done after which nothing runs in this process; the next leaves it out."""
        text = f"{candidate.label} broke {self.device} when it was tried for {kind} {problem}: {reason}"
        if self._store is None or candidate.route == "expand":
            return UnfinishedError(text)
        self._store.reject(self.setting, _key(kind, problem), candidate.label, f"{CRASHED} when it was tried: {reason}")
        return UnfinishedError(f"{text}; {self._store.path} has it, so the next start leaves it out")

    def given(self, candidate: Candidate, operands: Operands) -> Operands:
        """Operands as a run would give them: with the metadata that the weight would have been given."""
        if not candidate.form or self.arrangement == "derived":
            return operands
        probe = Dispatcher(self.device, self.vendors, arrangement=self.arrangement)
        rows, columns = operands.indices.shape[0], operands.indices.shape[1] * 8
        probe._forms[rows, columns, operands.values.dtype] = candidate.form
        values, metadata = probe.lay(operands.values, operands.indices)
        if metadata is None:
            return operands
        if self.arrangement == "kept" and metadata[1].data_ptr() == values.data_ptr() + values.nbytes:
            # By chance, and so not in a run: it would be measured as "in place".
            metadata = metadata[0], metadata[1].clone()
        return replace(operands, values=values, form=metadata[0], metadata=metadata[1])


def round_tokens(tokens: int) -> int:
    """The number of tokens that stands for this one where it was not warmed up: the next power of two."""
    return 1 << max(tokens - 1, 0).bit_length()


def _ready_key(kind: Kind, operands: Operands) -> ReadyKey:
    rows, width = operands.indices.shape
    return kind, operands.x.shape[0], rows, width, operands.x.dtype


def _problem(operands: Operands) -> Problem:
    rows, width = operands.indices.shape
    return Problem(operands.x.shape[0], rows, width * 8, operands.x.dtype, operands.x.device)


def _key(kind: Kind, problem: Problem) -> str:
    dtype = str(problem.dtype).removeprefix("torch.")
    return f"{kind} {problem.rows}x{problem.columns} {problem.tokens} {dtype}"


def _expand(kind: Kind) -> Candidate:
    return ways.EXPAND if kind == "product" else ways.EXPAND_DOUBLY_PRUNED


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with on(device):
        return torch.cuda.is_current_stream_capturing()


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
