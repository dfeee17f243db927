"""Ranks that are slower than the others.

In synchronous training every rank's step takes the same time, that of the slowest: its own time has to be taken apart
from its waiting. Two things are measured on every rank, neither of which holds a collective, so that they mean the same
in every layout:

compute  every few steps, right after a step, each rank times the same fixed piece of work (`Probe`) on its own device,
         which is then as warm as training makes it. A pipeline stage with fewer layers is not "fast" by it, and a GPU
         with a low clock is slow.
loading  the time in which a rank makes its micro-batches, before the first collective of the step.

Scores, 1 where all are alike:

compute  (median rank's seconds) / (own seconds): the rank's speed as a share of the median rank's. "own best" is the
         same against the rank's own best time of this process.
loading  1 - (own seconds - median rank's) / (seconds of a step): what steps would take, as a share of what they take,
         if this rank loaded as fast as the median one.

Of an even number of ranks the median is the faster of the two in the middle, so that of two ranks the slow one is
told from the other. A rank is slow where the median of its last `WINDOW` scores is below the threshold: single bad
measurements, of which a busy machine has many, do not count. The default threshold, 0.75, is the usual one; a rank
that is 1.3 times slower scores 0.77. Equal ranks have scored 0.95 at worst on a machine with three times as much to run
as it has cores, and 0.83 on a virtual one of whose two cores one was slower: 0.85 finds more, where cores are alike. On
a GPU, which no other program uses, a rank is also slow where its own best says so: all of a machine may have become
hot at once.

What it does not see: time in which other programs have the cores of a CPU rank; a slow network link, which is in the
collectives.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, median_low
from typing import ClassVar, Literal

import torch
import torch.distributed as dist

from slope_dist.comparing.finding import Finding, Hosts
from slope_dist.parallel import collectives

WINDOW = 7
"""Scores whose median counts: four bad ones of seven make a rank slow."""

FEWEST = 4
"""Scores before which nothing is said."""

PIECES = 3
RELIEF = 0.05
"""How far above the threshold a score must rise until the rank is not slow any more."""

What = Literal["compute", "loading"]


class Probe:
    """A fixed piece of work on this rank's device: products of square matrices. No random stream of torch is touched.

    On GPUs `PRODUCTS` of bf16 2048 x 2048 (0.55 TFLOP in all: a millisecond or two with all pieces), timed by CUDA
    events; on CPUs fp32 192 x 192 (0.28 GFLOP), by this thread's CPU time.
    """

    PRODUCTS: ClassVar = {"cuda": 32, "cpu": 20}

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or collectives.device()
        size, dtype = (2048, torch.bfloat16) if self.device.type == "cuda" else (192, torch.float32)
        # Not zeros, whose products take less power and so leave the clock higher than training does.
        draw = torch.Generator(self.device).manual_seed(0)
        self._a, self._b = (
            torch.randn(size, size, dtype=dtype, device=self.device, generator=draw) / size**0.5 for _ in range(2)
        )
        self._product = torch.empty_like(self._a)
        self.seconds()

    @torch.no_grad()
    def seconds(self) -> float:
        """The fastest of `PIECES` times of the work: what the device can do now, without what came in between."""
        return min(self._once() for _ in range(PIECES))

    def _once(self) -> float:
        if self.device.type != "cuda":
            # What other programs have of a core in between is not this work; on a busy machine it would be most of it.
            start = time.thread_time()
            self._work()
            return time.thread_time() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def _work(self) -> None:
        for _ in range(self.PRODUCTS[self.device.type]):
            torch.mm(self._a, self._b, out=self._product)


@dataclass(frozen=True)
class Measurement:
    """What one rank has measured: seconds of the probe, of loading for a step, and of a step."""

    probe: float
    loading: float
    step: float


@dataclass
class _Rank:
    """What is known of one rank."""

    scores: dict[What, deque[float]]
    probes: deque[float]
    best: float = float("inf")
    slow: set[What] | None = None

    @classmethod
    def new(cls) -> _Rank:
        return cls({"compute": deque(maxlen=WINDOW), "loading": deque(maxlen=WINDOW)}, deque(maxlen=WINDOW), slow=set())


class Scores:
    """Scores of all ranks, from their measurements. No collectives: every rank keeps the same book.

    Args:
        ranks: how many.
        threshold: the score below which a rank is slow.
        own_best: whether a rank may be slow by its own best.
    """

    def __init__(self, ranks: int, threshold: float, *, own_best: bool) -> None:
        self.threshold = threshold
        self.own_best = own_best
        self._ranks = [_Rank.new() for _ in range(ranks)]

    def add(self, measurements: Sequence[Measurement]) -> list[tuple[int, What, bool]]:
        """Take note of one measurement of every rank; returns (rank, what, whether it is slow now) for each change."""
        probe = median_low(m.probe for m in measurements)
        loading = median_low(m.loading for m in measurements)
        changes: list[tuple[int, What, bool]] = []
        for index, (rank, measured) in enumerate(zip(self._ranks, measurements, strict=True)):
            rank.scores["compute"].append(probe / measured.probe)
            rank.scores["loading"].append(1 - (measured.loading - loading) / measured.step)
            rank.probes.append(measured.probe)
            if len(rank.probes) < FEWEST:
                continue
            rank.best = min(rank.best, median(rank.probes))
            assert rank.slow is not None
            for what in ("compute", "loading"):
                score = self.score(index, what)
                if what == "compute" and self.own_best:
                    score = min(score, self.own_score(index))
                slow = score < self.threshold + (RELIEF if what in rank.slow else 0.0)
                if slow != (what in rank.slow):
                    rank.slow ^= {what}
                    changes.append((index, what, slow))
        return changes

    def score(self, rank: int, what: What) -> float:
        """Median of a rank's last scores."""
        return median(self._ranks[rank].scores[what])

    def own_score(self, rank: int) -> float:
        """A rank's best time over its time of now."""
        return self._ranks[rank].best / median(self._ranks[rank].probes)


class Stragglers:
    """Measures, exchanges and tells. Every rank calls `look` at the same steps.

    Args:
        threshold: see `Scores`.
        hosts: machines of the ranks.
    """

    def __init__(self, threshold: float, hosts: Hosts) -> None:
        self._hosts = hosts
        self._probe = Probe()
        own_best = self._probe.device.type == "cuda"
        self.scores = Scores(collectives.world_size(), threshold, own_best=own_best)
        self._loading = 0.0
        self._steps = 0
        self._since = time.perf_counter()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Around what makes the micro-batches of a step."""
        start = time.perf_counter()
        yield
        self._loading += time.perf_counter() - start
        self._steps += 1

    def look(self) -> list[Finding]:
        """What has changed since the last look. Collective."""
        now, steps = time.perf_counter(), max(1, self._steps)
        own = Measurement(self._probe.seconds(), self._loading / steps, (now - self._since) / steps)
        changes = self.scores.add(_all_gather(own))
        self._loading, self._steps, self._since = 0.0, 0, time.perf_counter()
        return [self._finding(*change) for change in changes]

    def _finding(self, rank: int, what: What, slow: bool) -> Finding:
        score, own = self.scores.score(rank, what), self.scores.own_score(rank)
        where = f"rank {rank} on {self._hosts[rank]}"
        row = {"rank": rank, "host": self._hosts[rank], "what": what, "slow": slow, "score": round(score, 3)}
        if what == "compute":
            row["own_score"] = round(own, 3)
            line = f"at {score:.2f} of the median rank's speed, {own:.2f} of its own best"
        else:
            line = f"score {score:.2f}: steps could take that share of their time if it loaded as the median rank does"
        line = f"warning: {where} is slow in {what}: {line}" if slow else f"{where} is no longer slow in {what}: {line}"
        return Finding(line, {"straggler": row}, {f"watch/{what}_score_of_rank_{rank}": score})


def _all_gather(own: Measurement) -> list[Measurement]:
    if collectives.world_size() == 1:
        return [own]
    sent = torch.tensor([own.probe, own.loading, own.step], dtype=torch.float64, device=collectives.device())
    received = [torch.empty_like(sent) for _ in range(collectives.world_size())]
    dist.all_gather(received, sent)
    return [Measurement(*row) for row in torch.stack(received).tolist()]
