"""The engine on DeepSpeed, ZeRO stages 0 to 3."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from slope_dist.engine.interface import MicroBatch, Skip, StepResult, moved
from slope_dist.engine.loading import index_patterns, load_fragments, load_steps, saved_steps
from slope_dist.engine.optimizer import AdamW, GuardedAdamW, OptimizerSettings, mean_over_ranks, parameter_groups
from slope_dist.engine.zero_state import ZeroState, zero_state
from slope_dist.errors import UserError
from slope_dist.layers import LogicalTensor, logical_tensors
from slope_dist.parallel.fragments import Fragment, StateSource
from slope_dist.parallel.groups import Groups, ModelParallelUnit
from slope_dist.sparse import SparseWeight, kernels
from slope_dist.transfer import Transfer

_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, and told not to compile its shared-memory collectives (45 s at first use; gloo is enough)."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # Asked, it would warn that it guessed so.
    # DeepSpeed calls torch collectives under their old names, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        # For CPUs alone; where there are GPUs, to ask tries the compilers for every one of DeepSpeed's kernels.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed


def check_precision(precision: str) -> None:
    """Refuse a precision that DeepSpeed will not run on this machine.

    Raises:
        UserError: naming what works.
    """
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    supported = {"fp16": accelerator.is_fp16_supported(), "bf16": accelerator.is_bf16_supported(), "fp32": True}
    if not supported[precision]:
        works = " or ".join(f'"{name}"' for name, can in supported.items() if can)
        raise UserError(
            f'precision "{precision}" is not supported by DeepSpeed on this machine ({accelerator.device_name()}); '
            f"use {works}"
        )


class LayerCaster:
    """Casts a layer to the run's dtype before the next layer is made, so that no model is ever whole in fp32."""

    def __init__(self, settings: dict[str, Any]) -> None:
        narrow = {"bf16": torch.bfloat16, "fp16": torch.float16}
        self._dtype = next((dtype for name, dtype in narrow.items() if settings[name]["enabled"]), torch.float32)

    def __call__(self, layer: nn.Module) -> None:
        """Cast the parameters of `layer`; metadata stays uint8, and what ZeRO 3 has partitioned is cast already."""
        for parameter in layer.parameters():
            if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.to(self._dtype)


class _Partitioner(LayerCaster):
    """Also leaves this rank only its share of the layer (ZeRO 3)."""

    def __init__(
        self, deepspeed: Any, groups: Groups, unit: ModelParallelUnit | None, settings: dict[str, Any]
    ) -> None:
        super().__init__(settings)
        self._deepspeed = deepspeed
        self._data = groups.data
        self._unit = unit
        self._settings = settings

    def __call__(self, layer: nn.Module) -> None:
        """Partition the parameters of `layer` that are not yet: the head's table may be the embedding's. Collective."""
        super().__call__(layer)
        # Without the group, global rank 0's values would be those of every tensor rank.
        self._deepspeed.zero.Init(
            module=layer, data_parallel_group=self._data, config_dict_or_path=self._settings, mpu=self._unit
        )


def guarded(loss: Tensor) -> Tensor:
    """The loss, whose gradients are NaN if it is not finite itself: scalar -> scalar.

    A loss that is not finite must not pass with gradients that are: the factor, which needs no host sync, makes them
    agree, and the global norm carries it to every rank.
    """
    factor = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
    return loss * factor.to(loss.dtype)


class DeepSpeedEngine:
    """See `Engine`: data ranks and tensor ranks, ZeRO 0 to 3.

    Args:
        make_model: makes the model, which called with (tokens, labels) returns the mean loss. It is given a function
            to call with each layer before the next is made.
        groups: process groups of the layout.
        settings: DeepSpeed's dictionary, derived from the config.
        optimizer: AdamW's numbers.
        column_mask_interval: steps between refreshes of held column masks.
    """

    def __init__(
        self,
        make_model: Callable[[Callable[[nn.Module], None]], nn.Module],
        groups: Groups,
        settings: dict[str, Any],
        optimizer: OptimizerSettings,
        *,
        column_mask_interval: int,
    ) -> None:
        deepspeed = import_deepspeed()
        self._deepspeed = deepspeed
        self._interval = column_mask_interval
        self.stage: int = settings["zero_optimization"]["stage"]
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist_init_required=False)
        unit = self._unit(groups)
        partitions = self.stage == 3
        model = make_model(_Partitioner(deepspeed, groups, unit, settings) if partitions else LayerCaster(settings))
        tensors = list(logical_tensors(model))
        for tensor in tensors:
            # DeepSpeed counts the others' norms on the first tensor rank only.
            tensor.tensor.tensor_model_parallel = tensor.split  # type: ignore[attr-defined]
        parameters = self._parameter_groups(model, tensors, optimizer)
        self._adam: AdamW
        if self.stage == 0:
            # DeepSpeed clips fp32 gradients at stage 0 without asking whether they are finite; ours asks.
            self._adam = GuardedAdamW(
                parameters,
                optimizer,
                counted={id(tensor.tensor) for tensor in tensors if tensor.owned},
                norm_group=groups.model,
            )
            settings = settings | {"gradient_clipping": 0.0}
        else:
            self._adam = AdamW(parameters, optimizer)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=self._adam, config=settings, mpu=unit)
        self.module: nn.Module = self._engine.module
        self._sparse = [module for module in self.module.modules() if isinstance(module, SparseWeight)]
        if self.stage == 0 and kernels.active() is not None:
            # Whole on this rank, in fp32: nothing else has the new values before the next forward pass.
            self._adam.write_transposes(w for w in self._sparse if w.resident_transpose)
        self._groups = groups
        position, layout = groups.position, groups.layout
        self._state: ZeroState = zero_state(
            self.stage, self._engine, self._adam, list(logical_tensors(model)), position.data, layout.data
        )
        self._adam.reset_state(self._state.flat_parameters())
        scaler = self._scaler()
        if scaler is not None:
            # At its minimum the scaler would raise; ours to count and to stop, like any other non-finite step.
            scaler.raise_error_at_min_scale = False
            self._minimum_scale = float(scaler.min_scale)
        self._indices_changed()

    def begin_step(self, step: int) -> None:
        """Refresh held column masks where (step - 1) is a multiple of the interval (rule R2)."""
        if self._interval == 1 or (step - 1) % self._interval:
            return
        for weight in self._sparse:
            with self._gathered([weight.values, weight.indices, weight.column_mask], modified=True):
                weight.refresh_column_mask()

    def set_learning_rates(self, rates: Mapping[str, float]) -> None:
        """Set the rate of each group for the next step."""
        for group in self._adam.param_groups:
            group["lr"] = rates["adapters" if group["name"] == "adapters" else "base"]

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """Forward, backward and one guarded update."""
        self._engine.train()
        total = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        scale_before = self._loss_scale()
        self._make_transposes()
        for batch in micro_batches:
            loss = self._engine(*moved(batch, self._engine.device))
            total += loss.detach()
            self._engine.backward(guarded(loss))
            self._engine.step()
        self._values_changed()
        return StepResult(
            mean_over_ranks(total / len(micro_batches), self._groups.data),
            float(self._engine.get_global_grad_norm()),
            self._skip(scale_before),
        )

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> Tensor:
        """Mean loss of this rank's batch. Collective at ZeRO 3: every rank calls it equally often."""
        self._engine.eval()
        loss = self._engine(*moved(batch, self._engine.device))
        if self.stage == 3:
            # It has gathered what the backward pass would begin with, and would keep it until the next one.
            self._engine.optimizer.empty_partition_cache()
        return loss

    def export_state(self) -> tuple[Iterable[Fragment], dict[str, Any]]:
        """Live fragments of this rank, step counters by parameter group, and fp16's loss scale."""
        steps = saved_steps(self._adam, self._state.flat_parameters())
        scalars: dict[str, Any] = {"optimizer_steps": steps}
        scaler = self._scaler()
        if scaler is not None:
            scalars["loss_scale"] = {name: getattr(scaler, name) for name in _SCALER_STATE}
        return self._state.fragments(), scalars

    def held(self) -> Iterable[Fragment]:
        """Whole weights and metadata below stage 3, shares of them at stage 3; optimizer state as it is exported."""
        return self._state.held()

    @torch.no_grad()
    def load_state(self, source: StateSource, *, new_adapters: bool = False, transfer: Transfer | None = None) -> None:
        """Take over a state. Collective."""
        adapters = {tensor.name for tensor in self._state.tensors if tensor.adapter}
        # A piece that is missing or bad on one rank must end all of them, before `sync` waits for it.
        load_fragments(
            source,
            self._state.fragments(),
            index_patterns(self._state.tensors, self._sparse),
            keep=adapters if new_adapters else (),
            transfer=transfer,
        )
        self._state.sync()
        self._indices_changed()
        load_steps(source, self._adam, self._state.flat_parameters())
        scaler = self._scaler()
        if scaler is not None and "loss_scale" in source.scalars:
            for name, value in source.scalars["loss_scale"].items():
                setattr(scaler, name, value)

    def close(self) -> None:
        """Release parameters, optimizer and hooks."""
        engine = self._engine
        engine.destroy()
        # Registered on global tables by DeepSpeed; left in place they keep every engine alive.
        engine.module_forward_pre_hook.remove()
        engine.module_forward_post_hook.remove()
        # ZeRO 3 hangs itself on every parameter, by ways that the garbage collector cannot follow, and keeps the
        # modules in a cache for ever: they must hold no memory. What crosses the adapter switch its fragments hold.
        for parameter in engine.module.parameters():
            vars(parameter).clear()
            parameter.data = parameter.data.new_empty(0)
        # While a local still names the engine, collecting would leave its state in memory.
        del engine
        del self._engine, self._state, self._adam, self._sparse, self.module
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _unit(self, groups: Groups) -> ModelParallelUnit | None:
        """What tells DeepSpeed of the groups."""
        return ModelParallelUnit(groups) if groups.layout.tensor > 1 else None

    def _parameter_groups(
        self, model: nn.Module, tensors: list[LogicalTensor], optimizer: OptimizerSettings
    ) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        return parameter_groups(tensors, optimizer)

    def _skip(self, scale_before: float | None) -> Skip | None:
        """Why the step just taken changed nothing, given the loss scale before it; None if it did."""
        if not self._engine.optimizer.overflow:
            return None
        return "loss scale" if scale_before is not None and scale_before > self._minimum_scale else "non-finite"

    def _values_changed(self) -> None:
        for weight in self._sparse:
            weight.values_changed()

    def _make_transposes(self) -> None:
        """Before the blocks run: one that made its own would be another graph than the one that finds it made."""
        for weight in self._sparse:
            if weight.resident_transpose:
                weight.transpose()

    def _indices_changed(self) -> None:
        for weight in self._sparse:
            weight.indices_changed()
            weight.prepare_kernels()

    def _gathered(self, parameters: list[Tensor | None], *, modified: bool) -> Any:
        if self.stage < 3:
            return nullcontext()
        return self._deepspeed.zero.GatheredParameters(
            [p for p in parameters if p is not None], modifier_rank=0 if modified else None
        )

    def _scaler(self) -> Any | None:
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        return scaler if getattr(scaler, "dynamic", False) else None

    def _loss_scale(self) -> float | None:
        scaler = self._scaler()
        return None if scaler is None else float(scaler.cur_scale)
