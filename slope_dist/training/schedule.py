"""Learning rates as a function of the step alone, so that a resumed run continues exactly."""

from __future__ import annotations

from math import cos, pi

from slope_dist.config import Config


def _shape(schedule: str, position: float) -> float:
    """Share of the way from the last rate to the peak, at `position` in [0, 1] of the decay."""
    if schedule == "constant":
        return 1.0
    return 1.0 - position if schedule == "linear" else 0.5 * (1.0 + cos(pi * position))


def _rate(step: int, steps: int, warmup: int, peak: float, last: float, schedule: str) -> float:
    """Rate of step `step` of `steps`: linear warm-up over `warmup` steps, then decay to `last` at the last step."""
    if step <= warmup:
        return peak * step / warmup
    position = (step - warmup) / max(1, steps - warmup)
    return last + (peak - last) * _shape(schedule, min(1.0, position))


def learning_rates(config: Config, step: int, first_adapter_step: int) -> dict[str, float]:
    """Rates of optimizer step `step` (from 1) by kind of parameter, "base" and "adapters".

    Before the adapters join both are the run's schedule. From then on `adapters.learning_rate_policy` decides: "follow"
    goes on; "rewarm_adapters" gives the adapters, "rewarm_all" everything, a second warm-up to a peak of its own
    and the same decay over the rest of the run (method of BERT's third phase, arXiv 2405.16325 appendix).
    """
    training, adapters = config.training, config.adapters
    base = _rate(
        step,
        training.steps,
        training.warmup_steps,
        training.learning_rate,
        training.min_learning_rate,
        training.schedule,
    )
    if step < first_adapter_step or adapters.learning_rate_policy == "follow":
        return {"base": base, "adapters": base}
    assert adapters.peak_learning_rate is not None
    again = _rate(
        step - first_adapter_step + 1,
        training.steps - first_adapter_step + 1,
        adapters.warmup_steps,
        adapters.peak_learning_rate,
        min(training.min_learning_rate, adapters.peak_learning_rate),
        training.schedule,
    )
    return {"base": again if adapters.learning_rate_policy == "rewarm_all" else base, "adapters": again}
