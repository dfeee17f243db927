"""Claim: a rank that is killed or raises, anywhere in a run, ends the others within 30 s, and the first line of error
says which rank and why; the others say nothing of their own.

Real ranks of the real entry point, which do to themselves what the case asks for.

Run: pytest tests/parallel/test_failure.py
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slope_dist.parallel import failure
from slope_dist.parallel.environment import Environment
from slope_dist.parallel.failure import Peers, Verdict, in_words, lost_a_peer
from tests.distributed import Outcome, end_ranks
from tests.runs import pretrain, watch_engines, write_config

LIMIT = 30.0
PLACES = ["trainer", "engine", "step", "evaluation", "save"]


def end_here(how: str) -> None:
    """Kill this process, or fail as a defect would."""
    print(f"ends at {time.time()}", flush=True)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "refuse":
        from slope_dist.errors import UserError

        raise UserError("no space left")
    if how == "interrupt":
        raise KeyboardInterrupt
    raise RuntimeError("boom\nand what else there is to say")


def failing_entry_point(config: str, place: str, how: str, failing: list[int]) -> None:
    """The entry point; the ranks of `failing` end in the given place of the run."""
    if int(os.environ["RANK"]) in failing:
        install(place, lambda: end_here(how))
    try:
        code = pretrain("--config", config)
    finally:
        print(f"left at {time.time()}", flush=True)
    raise SystemExit(code)


def install(place: str, act: Callable[[], None]) -> None:
    """Let `act` run in a place of this process's run."""
    from slope_dist.checkpoint import writer
    from slope_dist.training import trainer

    def before(module: Any, name: str) -> None:
        original = getattr(module, name)

        def replaced(*arguments: Any, **keywords: Any) -> Any:
            act()
            return original(*arguments, **keywords)

        setattr(module, name, replaced)

    if place == "trainer":
        before(trainer, "refuse_what_will_not_fit")
    elif place == "engine":
        # Between two collectives of DeepSpeed's own construction.
        from slope_dist.engine.optimizer import AdamW

        before(AdamW, "reset_state")
    elif place == "step":
        # In a backward pass of the second micro-batch: gradients are on their way between the ranks.
        watch_engines(lambda event, engine, step: event == "before step" and step == 3 and in_backward(engine, act))
    elif place == "evaluation":
        before(trainer, "evaluate_mixture")
    elif place == "save":
        # What is raised while files are written becomes a warning of all ranks, by a vote; raised in the vote, it ends.
        before(writer, "_write_safetensors")
        before(writer, "gather_json")


def in_backward(engine: Any, act: Callable[[], None]) -> None:
    parameter = next(engine.module.parameters())
    seen = 0

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen == 2:
            act()
        return gradient

    parameter.register_hook(hook)


def run(corpus: Path, folder: Path, ranks: int, place: str, how: str, failing: list[int]) -> list[Outcome]:
    config = write_config(folder, corpus, evaluation__interval=4, checkpoint__interval=4)
    outcomes = end_ranks(failing_entry_point, ranks, str(config), place, how, failing, process_group=False)
    ended = [float(line.split()[-1]) for o in outcomes for line in o.output.splitlines() if line.startswith("ends at")]
    assert ended, "the case never came to the place where it was to fail"
    left = [float(line.split()[-1]) for o in outcomes for line in o.output.splitlines() if line.startswith("left at")]
    assert max(left, default=time.time()) - min(ended) < LIMIT
    # Nobody had to be killed by the test.
    killed = {rank for rank, outcome in enumerate(outcomes) if outcome.code == -signal.SIGKILL}
    assert killed == (set(failing) if how == "kill" else set()), [o.errors for o in outcomes]
    return outcomes


def first_line(errors: str) -> str:
    return errors.strip().splitlines()[0]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", PLACES)
def test_a_killed_rank_ends_the_other_which_names_it(place: str, rank: int, corpus: Path, tmp_path: Path) -> None:
    outcomes = run(corpus, tmp_path, 2, place, "kill", [rank])
    survivor = outcomes[1 - rank]
    assert survivor.code == 1
    said = survivor.errors.strip().splitlines()
    assert said[0] == (
        f"error: rank {rank} was lost (killed, or its machine failed): the others lost their connection to it"
    )
    assert len(said) == (1 if place == "trainer" else 2), survivor.errors
    if place == "save":
        assert "there is no checkpoint yet; start again with: deepspeed --num_gpus 2" in said[1]
    assert outcomes[rank].errors == ""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", PLACES)
def test_a_rank_that_raises_says_why_and_ends_the_other_in_silence(
    place: str, rank: int, corpus: Path, tmp_path: Path
) -> None:
    outcomes = run(corpus, tmp_path, 2, place, "raise", [rank])
    assert [outcome.code for outcome in outcomes] == [1, 1]
    failed = outcomes[rank].errors
    assert first_line(failed).startswith(f"error: rank {rank} failed: RuntimeError: boom (tests/parallel/test_failure.")
    assert "Traceback" in failed and "and what else there is to say" in failed
    assert ("with: deepspeed --num_gpus 2" in failed.splitlines()[-1]) == (place != "trainer")
    assert outcomes[1 - rank].errors == ""


@pytest.mark.parametrize("failing", [[2], [1, 2]])
def test_of_four_ranks_only_dead_ones_are_named_and_once(failing: list[int], corpus: Path, tmp_path: Path) -> None:
    outcomes = run(corpus, tmp_path, 4, "step", "kill", failing)
    # Of two that die one after the other, the later one does not matter.
    possible = [Verdict((rank,), None) for rank in failing] + [Verdict(tuple(failing), None)]
    assert first_line(outcomes[0].errors) in [f"error: {verdict.lost_line()}" for verdict in possible]
    assert [outcome.code for outcome in outcomes if outcome.code != -signal.SIGKILL] == [1] * (4 - len(failing))
    assert [outcome.errors for outcome in outcomes[1:]] == [""] * 3


def test_ranks_that_die_together_are_named_together() -> None:
    assert Verdict((1, 2), None).lost_line().startswith("ranks 1, 2 were lost")


def test_a_defect_of_all_ranks_is_told_once(corpus: Path, tmp_path: Path) -> None:
    outcomes = run(corpus, tmp_path, 2, "evaluation", "raise", [0, 1])
    assert [outcome.code for outcome in outcomes] == [1, 1]
    assert "".join(outcome.errors for outcome in outcomes).count("Traceback") == 1


@pytest.mark.parametrize("failing", [[1], [0, 1]])
def test_what_the_user_can_mend_keeps_its_exit_code(failing: list[int], corpus: Path, tmp_path: Path) -> None:
    outcomes = run(corpus, tmp_path, 2, "evaluation", "refuse", failing)
    assert [outcome.code for outcome in outcomes] == ([2, 2] if 0 in failing else [1, 2])
    speaker, other = (outcomes[0], outcomes[1]) if 0 in failing else (outcomes[1], outcomes[0])
    assert first_line(speaker.errors) == ("error: no space left" if 0 in failing else "error: rank 1: no space left")
    assert "step-00000004; go on with: deepspeed" in speaker.errors and "Traceback" not in speaker.errors
    assert other.errors == ""


def test_an_interrupted_run_says_how_to_go_on_once(corpus: Path, tmp_path: Path) -> None:
    outcomes = run(corpus, tmp_path, 2, "evaluation", "interrupt", [0, 1])
    assert [outcome.code for outcome in outcomes] == [130, 130]
    assert first_line(outcomes[0].errors).startswith("the last complete checkpoint is ")
    assert outcomes[1].errors == ""


def stuck_beside_a_dead_rank(how: str) -> None:
    """Rank 1 ends while rank 0 waits for it where nothing will wake it, as in a collective of NCCL's."""
    from slope_dist.parallel import environment

    place = environment.discover()
    environment.start(place, threads=1)
    peers = Peers(place, lambda cause: "advice")
    if place.rank == 1:
        if how == "raise":
            peers.fail("its cause", shared=False)
            raise SystemExit(peers.leave(1))
        end_here(how)
    time.sleep(LIMIT + 10)


@pytest.mark.parametrize(("how", "said"), [("kill", "error: rank 1 was lost"), ("raise", "")])
def test_a_rank_held_in_a_collective_is_ended(how: str, said: str) -> None:
    outcomes = end_ranks(stuck_beside_a_dead_rank, 2, how, process_group=False)
    assert outcomes[0].code == 1, outcomes[0].errors
    assert outcomes[0].errors.startswith(said) and bool(outcomes[0].errors) == bool(said)


class FullDisk:
    """What stderr is once its disk is full."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    flush = write


def stuck_without_a_voice(folder: str, words: str) -> None:
    """As above; rank 0 can write to neither of its outputs."""
    from slope_dist.parallel import environment

    def last_words(cause: str) -> str:
        Path(folder, "words").write_text(cause)
        if words == "raise":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return "advice"

    place = environment.discover()
    environment.start(place, threads=1)
    Peers(place, last_words)
    if place.rank == 1:
        end_here("kill")
    sys.stdout = sys.stderr = FullDisk()  # type: ignore[assignment]
    time.sleep(LIMIT + 10)


@pytest.mark.parametrize("words", ["say", "raise"])
def test_a_rank_that_cannot_say_it_ends_all_the_same(words: str, tmp_path: Path) -> None:
    outcomes = end_ranks(stuck_without_a_voice, 2, str(tmp_path), words, process_group=False)
    assert outcomes[0].code == 1, outcomes[0].errors
    assert (tmp_path / "words").read_text().startswith("rank 1 was lost")


def a_stranger_calls() -> None:
    """Something that is no rank connects to rank 0's port, talks, and hangs up."""
    import torch.distributed as dist

    from slope_dist.parallel import environment

    place = environment.discover()
    environment.start(place, threads=1)
    peers = Peers(place, lambda cause: "")
    address = json.loads(dist.distributed_c10d._get_default_store().get(failure._KEY))
    for said in (b"GET / HTTP/1.1\r\n\r\n", b'{"kind": "hello", "rank": 1, "token": "guessed"}\n', b'["hello"]\n', b""):
        with socket.create_connection(("localhost", address["port"])) as stranger:
            stranger.sendall(said)
    dist.barrier()
    time.sleep(0.2)
    peers.part()
    environment.stop()


def test_a_stranger_on_the_port_ends_nothing() -> None:
    outcomes = end_ranks(a_stranger_calls, 2, process_group=False)
    assert [(outcome.code, outcome.errors) for outcome in outcomes] == [(0, ""), (0, "")]


def test_alone_there_is_nobody_to_tell() -> None:
    peers = Peers(Environment(0, 1, 0, 1, "none"), lambda cause: "")
    assert peers.fail("a cause", shared=False) and peers.is_to_blame
    assert not peers.lose("a cause")
    peers.part()
    assert peers.leave(3) == 3


def caught(raiser: Callable[[], object]) -> BaseException:
    try:
        raiser()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def test_only_what_another_ranks_end_led_to_is_a_loss() -> None:
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")

    def own_error_after_it() -> None:
        try:
            raise gone
        finally:
            raise ValueError("closing failed too")

    def it_after_own_error() -> None:
        try:
            raise ValueError("mine")
        finally:
            raise RuntimeError("Connection closed by peer")

    assert lost_a_peer(gone) and lost_a_peer(caught(own_error_after_it))
    assert not lost_a_peer(caught(it_after_own_error))
    assert not lost_a_peer(ConnectionResetError("Connection reset by peer")), "that is a file system, or a download"
    assert not lost_a_peer(RuntimeError("CUDA out of memory"))


def test_an_exception_in_one_line() -> None:
    here = f"tests/parallel/test_failure.py:{sys._getframe().f_lineno + 1}"
    said = in_words(caught(lambda: torch.zeros(2, 3) @ torch.zeros(2, 3)))
    assert said.startswith("RuntimeError: mat1 and mat2 shapes cannot be multiplied") and said.endswith(f"({here})")
    assert in_words(KeyError()) == "KeyError"
