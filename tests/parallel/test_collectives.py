"""Plain data between ranks: gathered and broadcast as it was, errors raised on all ranks alike.

Run: pytest tests/parallel/test_collectives.py
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from slope_dist.errors import UnfinishedError, UserError, may_pass
from slope_dist.parallel import collectives
from tests.distributed import run_ranks

VALUES: list[Any] = [{"a": [1, 2.5, None, True], "é": "\u2581 x" * 400}, None, "", [], 0]


def exchange() -> dict[str, Any]:
    rank = collectives.rank()
    gathered = [collectives.all_gather_json([rank, value] if rank else value) for value in VALUES]
    broadcast = [collectives.broadcast_json(value if rank == 0 else "other") for value in VALUES]
    total = collectives.sum_over_ranks([rank + 0.5, 1e-9])
    dist.barrier()
    return {
        "size": collectives.world_size(),
        "rank": rank,
        "gathered": gathered,
        "broadcast": broadcast,
        "total": total,
    }


def disagree(errors: list[str | None]) -> str | None:
    try:
        collectives.agree(errors[collectives.rank()])
    except UserError as error:
        return str(error)
    return None


def test_two_ranks() -> None:
    for rank, seen in enumerate(run_ranks(exchange, 2)):
        assert (seen["size"], seen["rank"]) == (2, rank)
        assert seen["gathered"] == [[value, [1, value]] for value in VALUES]
        assert seen["broadcast"] == VALUES
        assert seen["total"] == [2.0, 2e-9]


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ([None, None], None),
        (["no disk", None], "no disk"),
        ([None, "no disk"], "rank 1: no disk"),
        (["no disk", "no network"], "no disk"),
    ],
)
def test_all_ranks_fail_alike(errors: list[str | None], said: str | None) -> None:
    assert run_ranks(disagree, 2, errors) == [said, said]


def meet_errors(number: int, failing: int) -> list[str]:
    """What `agree`, `together` and `alone` raise on this rank where rank `failing` has a system's error."""

    def fail(alive: object = None) -> None:
        try:
            raise OSError(number, "no answer")
        except OSError as error:
            raise UserError("cannot read it") from error

    def together() -> None:
        with collectives.together():
            if collectives.rank() == failing:
                fail()

    raised = []
    for work in (together, lambda: collectives.alone(fail)):
        try:
            work()
        except UserError as error:
            raised.append(f"{error}: {may_pass(error)}")
    return raised


@pytest.mark.parametrize(
    ("number", "passes"), [(errno.EIO, True), (errno.EDQUOT, True), (errno.EHOSTDOWN, True), (errno.ENOENT, False)]
)
def test_all_ranks_know_whether_an_error_may_pass(number: int, passes: bool) -> None:
    assert run_ranks(meet_errors, 2, number, 0) == [[f"cannot read it: {passes}"] * 2] * 2
    assert [raised[0] for raised in run_ranks(meet_errors, 2, number, 1)] == [f"rank 1: cannot read it: {passes}"] * 2


def test_without_a_process_group_a_process_talks_to_itself() -> None:
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    assert collectives.all_gather_json({"a": 1}) == [{"a": 1}]
    assert collectives.broadcast_json([2]) == [2]
    assert collectives.sum_over_ranks([0.5]) == [0.5]
    collectives.agree(None)
    with pytest.raises(UserError, match=r"^bad$"):
        collectives.agree("bad")


@pytest.mark.parametrize(
    "failure", [UnfinishedError("the card is broken"), ValueError("a defect")], ids=["told", "defect"]
)
def test_what_broke_the_ranks_device_is_raised_and_not_that_it_is_broken(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(value: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def work(alive: Callable[[], None]) -> None:
        raise failure

    with pytest.raises(type(failure)) as told:
        collectives.alone(work)
    assert told.value is failure
    monkeypatch.setattr(collectives, "broadcast_json", broken)
    with pytest.raises(type(failure)) as told:
        collectives.alone(work)
    assert told.value is failure
    with pytest.raises(RuntimeError, match="illegal memory access"):
        collectives.alone(lambda alive: None)


def wait_longer_than_a_collective(outcome: str) -> str | None:
    """The first rank works for longer than the group lets a collective wait, in many small pieces."""
    here, ranks = dist.get_rank(), dist.get_world_size()
    address, minute = os.environ["MASTER_ADDR"], timedelta(seconds=60)
    # To meet may take longer on a busy machine than what a collective is given; and on a port of its own, lest a rank
    # meets the store that another is just leaving.
    store = None
    if here == 0:
        store = dist.TCPStore(address, 0, ranks, is_master=True, timeout=minute, wait_for_workers=False)
    port = collectives.broadcast_json(0 if store is None else store.port)
    if store is None:
        store = dist.TCPStore(address, port, ranks, is_master=False, timeout=minute)
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=store, rank=here, world_size=ranks, timeout=timedelta(seconds=5))
    collectives.BEAT_SECONDS = 0.2

    def work(alive: Callable[[], None]) -> str:
        for _ in range(90):
            time.sleep(0.1)
            alive()
        if outcome == "refused":
            raise UserError("a file was altered")
        return outcome

    try:
        return collectives.alone(work)
    except UserError as error:
        return f"error: {error}"


def test_the_others_wait_for_one_as_long_as_it_takes() -> None:
    assert run_ranks(wait_longer_than_a_collective, 2, "done") == ["done", None]


@pytest.mark.slow
def test_and_hear_why_it_fails() -> None:
    assert run_ranks(wait_longer_than_a_collective, 2, "refused") == ["error: a file was altered"] * 2
