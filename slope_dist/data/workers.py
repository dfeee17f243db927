"""Jobs in processes of their own, over pipes: the answers come in the order of the batches, whoever made them.

A message is two lengths, a JSON header and bytes, so nothing is pickled. A worker ends when its input ends, which is
also what it sees when this process is killed.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from slope_dist.data.jobs import Job, Result
from slope_dist.data.readers import Document, Lines, Rejected, Row
from slope_dist.errors import UnfinishedError

Tag = TypeVar("Tag")

_LENGTHS = struct.Struct("<QQ")
# One that it works on, and one that waits: it need not wait for the next.
_BATCHES_EACH = 2
_ROOT = Path(__file__).resolve().parents[2]


def in_order(
    job: Job, batches: Iterator[tuple[Sequence[Row], Tag]], workers: int
) -> Generator[tuple[Tag, Result], None, None]:
    """Do the job for each batch; yields its tag and its result, in the order of the batches.

    Args:
        job: what to do.
        batches: rows with a tag; read as they are needed, a few for each worker ahead.
        workers: processes, started as they are needed; 1: this process does it all.

    Raises:
        UnfinishedError: a worker died.
        Exception: what `batches` raises, after the results of the batches before it.
    """
    if workers == 1:
        for batch, tag in batches:
            yield tag, job(batch)
        return
    pool = _Pool(job, workers)
    waiting: deque[tuple[Tag, _Worker]] = deque()
    failure: Exception | None = None
    done = False
    try:
        while True:
            while not done and len(waiting) < 2 * _BATCHES_EACH * workers and (worker := pool.free()):
                try:
                    batch, tag = next(batches)
                except StopIteration:
                    done = True
                except Exception as error:
                    # The batches before it come first, as they do in one process.
                    failure, done = error, True
                else:
                    worker.send(batch)
                    waiting.append((tag, worker))
            if not waiting:
                break
            tag, worker = waiting[0]
            if worker.results:
                waiting.popleft()
                yield tag, worker.results.popleft()
            else:
                pool.receive()
    finally:
        pool.close()
    if failure is not None:
        raise failure


class _Worker:
    """One process. Its answers come in the order of its batches."""

    def __init__(self, job: Job):
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        # Each is one of many, so its libraries need no threads. Its own process group: Ctrl-C is for this process,
        # which ends the others.
        self._process: subprocess.Popen[bytes] = subprocess.Popen(
            # -P: nothing in the current folder is taken for a library.
            [sys.executable, "-P", "-m", "slope_dist.data.worker"],
            env=os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self.output = self._process.stdin, self._process.stdout
        self.results: deque[Result] = deque()
        self.busy = 0
        self._write(job.settings())

    def send(self, batch: Sequence[Row]) -> None:
        """Give it a batch."""
        self.busy += 1
        header, parts = pack(batch)
        self._write(header, *parts)

    def receive(self) -> None:
        """Take an answer, which it is about to give."""
        message = read_message(self.output)
        if message is None:
            raise self._dead()
        header, payload = message
        self.busy -= 1
        self.results.append(Result(header["facts"], split(payload, header["sizes"])))

    def close(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._input, self.output):
            pipe.close()

    def _write(self, header: object, *parts: bytes) -> None:
        try:
            write_message(self._input, header, *parts)
        except BrokenPipeError as error:
            raise self._dead() from error

    def _dead(self) -> UnfinishedError:
        code = self._process.wait()
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            how += ", as where memory runs out; use fewer workers" if -code == signal.SIGKILL else ""
        else:
            how = f"ended with exit code {code}"
        return UnfinishedError(f"worker process {self._process.pid} {how}")


class _Pool:
    def __init__(self, job: Job, most: int):
        self._job = job
        self._most = most
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()

    def free(self) -> _Worker | None:
        """The worker with the fewest batches, a new one if all have some; None if all have enough."""
        least = min(self._workers, key=lambda worker: worker.busy, default=None)
        if len(self._workers) < self._most and (least is None or least.busy):
            least = _Worker(self._job)
            self._workers.append(least)
            self._selector.register(least.output, selectors.EVENT_READ, least)
        return least if least is not None and least.busy < _BATCHES_EACH else None

    def receive(self) -> None:
        """Wait for answers."""
        for key, _ in self._selector.select():
            key.data.receive()

    def close(self) -> None:
        """End all."""
        self._selector.close()
        for worker in self._workers:
            worker.close()


def pack(batch: Sequence[Row]) -> tuple[list[list[Any]], list[bytes]]:
    """A batch as plain data and bytes."""
    header: list[list[Any]] = []
    parts = []
    for row in batch:
        data = b""
        if isinstance(row, Lines):
            fields, data = ["lines", row.name, row.path, row.field, row.first], row.data
        elif isinstance(row, Document):
            fields, data = ["document", row.name], row.text.encode()
        else:
            fields = ["rejected", row.reason]
        header.append([len(data), *fields])
        parts.append(data)
    return header, parts


def unpack(header: list[list[Any]], payload: bytes) -> list[Row]:
    """The batch that `pack` was given."""
    batch: list[Row] = []
    for (_, kind, *fields), data in zip(header, split(payload, [size for size, *_ in header]), strict=True):
        if kind == "lines":
            name, path, field, first = fields
            batch.append(Lines(name=name, path=path, field=field, first=first, data=data))
        elif kind == "document":
            batch.append(Document(name=fields[0], text=data.decode()))
        else:
            batch.append(Rejected(fields[0]))
    return batch


def split(payload: bytes, sizes: Sequence[int]) -> list[bytes]:
    """The payload in parts of these sizes."""
    parts, start = [], 0
    for size in sizes:
        parts.append(payload[start : start + size])
        start += size
    return parts


def write_message(stream: IO[bytes], header: object, *parts: bytes) -> None:
    """Write all of a message to an unbuffered stream."""
    text = json.dumps(header).encode()
    left = memoryview(b"".join([_LENGTHS.pack(len(text), sum(map(len, parts))), text, *parts]))
    while left:
        left = left[stream.write(left) :]


def read_message(stream: IO[bytes]) -> tuple[Any, bytes] | None:
    """Header and bytes of the next message; None where the stream ends, even within one."""
    lengths = _read(stream, _LENGTHS.size)
    if lengths is None:
        return None
    header, payload = (_read(stream, length) for length in _LENGTHS.unpack(lengths))
    return None if header is None or payload is None else (json.loads(header), payload)


def _read(stream: IO[bytes], count: int) -> bytes | None:
    parts = []
    while count:
        part = stream.read(count)
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
