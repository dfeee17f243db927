"""Reading small files whose makers are not to be trusted."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_bounded(path: Path | str, limit: int) -> bytes:
    """The bytes of a plain file, which a pipe (waiting for ever) or a file without end (all memory) is not.

    Raises:
        OSError: also if it is no plain file, or holds more than `limit` bytes.
    """
    # A pipe without a writer would keep an ordinary open waiting.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a plain file", str(path))
        if found.st_size > limit:
            raise OSError(errno.EFBIG, f"{found.st_size} bytes, and at most {limit} are expected", str(path))
        return file.read(limit)
