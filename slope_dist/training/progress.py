"""The progress line: rewritten in place on a terminal, plain lines elsewhere. Rank 0 only."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

from slope_dist.output import tell
from slope_dist.training.utilization import Utilization
from slope_dist.transfer import duration_text, size_text


def peak_memory() -> int:
    """Peak bytes of this process: device memory where there is a GPU, resident memory otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class PeakMemory:
    """Peak of the bytes used inside a `with` block, above those used at its start."""

    bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            try:
                # Linux: writing 5 sets the high-water mark of resident memory back to what is used now.
                Path("/proc/self/clear_refs").write_text("5")
                self._start = self._high_water_mark()
            except OSError:
                self._start = -1
        return self

    def __exit__(self, *exception: object) -> None:
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated() - self._start
        elif self._start >= 0:
            # Memory that was free inside the process at the start counts as used, so a small block may stay below it.
            self.bytes = max(0, self._high_water_mark() - self._start)

    @staticmethod
    def _high_water_mark() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


class ProgressLine:
    """step/total, %, loss, tokens/s, MFU, peak memory, phase, time left.

    Args:
        first_step: the first step of this process.
        steps: the run's last step.
        tokens_per_step: over all ranks.
        utilization: what turns tokens a second into MFU.
        log_interval: steps between plain lines.
        show: False on ranks that keep quiet.
    """

    def __init__(
        self,
        *,
        first_step: int,
        steps: int,
        tokens_per_step: int,
        utilization: Utilization,
        log_interval: int,
        show: bool,
    ) -> None:
        self.steps = steps
        self.first_step = first_step
        self.tokens_per_step = tokens_per_step
        self.utilization = utilization
        self.log_interval = log_interval
        self.show = show
        self._console = Console(soft_wrap=True, highlight=False)
        self._live: Live | None = None
        self._last = self._after_first = time.perf_counter()
        self._busy, self._unsaid = 0.0, 0
        self._peak = 0

    def start(self) -> None:
        """Take the terminal, if there is one, and start the clock."""
        if self.show and self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        self.pause()

    def step(self, step: int, loss: float, phase: str, skipped: str | None) -> float:
        """Show a step that has just ended; returns tokens per second since the one before."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        rate = self.tokens_per_step / seconds
        self._busy += seconds
        self._unsaid += 1
        if self.show:
            # The first step carries one-time costs; leave it out of the estimate once there is another.
            done = step - self.first_step
            per_step = (now - self._after_first) / done if done else seconds
            left = per_step * (self.steps - step)
            if self._live is not None:
                self._live.update(Text(self._text(step, loss, rate, phase, skipped, left)), refresh=True)
            elif step % self.log_interval == 0 or step in (self.first_step, self.steps) or skipped:
                # Of all steps since the last line: one alone may have been slow or fast.
                mean = self._unsaid * self.tokens_per_step / self._busy
                self._busy, self._unsaid = 0.0, 0
                tell(self._text(step, loss, mean, phase, skipped, left))
            if not done:
                self._after_first = now
        return rate

    def say(self, text: str) -> None:
        """Print a line of its own, above the progress line."""
        if self.show and self._live is not None:
            self._console.print(Text(text))
        elif self.show:
            tell(text)

    def pause(self) -> None:
        """Leave out of the next step's time what came since the last one: evaluation, saving, the switch."""
        self._last = time.perf_counter()

    def close(self) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _text(self, step: int, loss: float, rate: float, phase: str, skipped: str | None, left: float) -> str:
        parts = [
            f"step {step}/{self.steps}",
            f"{100 * step / self.steps:.1f} %",
            f"loss {loss:.4f}",
            f"{rate:,.0f} tokens/s",
            *self.utilization.shown(rate),
        ]
        # Measuring the switch sets the system's own peak back.
        self._peak = max(self._peak, peak_memory())
        parts += [f"peak memory {size_text(self._peak)}", phase]
        if skipped:
            parts.append(f"SKIPPED ({skipped})")
        parts.append(f"{duration_text(left)} left")
        return " | ".join(parts)
