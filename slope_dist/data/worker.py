"""The program of a worker process: `python -m slope_dist.data.worker`, started by workers.py and of no use alone."""

from __future__ import annotations

import os
import signal
from queue import SimpleQueue
from threading import Thread
from typing import Any, BinaryIO

from slope_dist.data.jobs import job_of
from slope_dist.data.workers import read_message, unpack, write_message


def main() -> None:
    """Answer batches until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What a library prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    batches = os.fdopen(0, "rb", buffering=0, closefd=False)
    first = read_message(batches)
    if first is None:
        return
    received: SimpleQueue[tuple[Any, bytes] | None] = SimpleQueue()
    # Whoever sends a batch need not wait until the one before is done, or the tokenizer loaded.
    Thread(target=_receive, args=(batches, received), daemon=True).start()
    job = job_of(first[0])
    while message := received.get():
        result = job(unpack(*message))
        header = {"facts": result.facts, "sizes": [len(part) for part in result.parts]}
        try:
            write_message(answers, header, *result.parts)
        except BrokenPipeError:
            return


def _receive(batches: BinaryIO, received: SimpleQueue[tuple[Any, bytes] | None]) -> None:
    message: tuple[Any, bytes] | None = (None, b"")
    while message is not None:
        message = read_message(batches)
        received.put(message)


if __name__ == "__main__":
    main()
