"""The one error class a user is meant to see.

Everything that a user can put right (a config, a file, a folder, a command line) raises `UserError`; entry points print
it as one line and exit with code 2. Anything else that is raised is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import errno

EXIT_BAD_INPUT = 2

EXIT_STOPPED = 75
"""Of a run that was asked to stop, and can go on: what sysexits.h calls a temporary failure."""

EXIT_HUNG = 137
"""Of ranks that are killed because the run hangs, as shells count (128 + SIGKILL): they cannot leave by themselves."""


class UserError(Exception):
    """What is wrong, where, and what would be right, in one line."""


class UnfinishedError(UserError):
    """What stopped the work is not in its input: the same may succeed later, or go on where it was."""


_PASSING = {
    errno.EIO,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENETRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
}
"""What disks and file servers say while they are full, or they or the network to them are out of order.

Whether somebody makes room nobody can know here. Who starts a run again gives up when that has not helped
(`slope_dist.cluster.requeue`).
"""


def may_pass(error: BaseException | None) -> bool:
    """Whether the same may succeed later: an `UnfinishedError`, or one that comes from a disk or network in trouble.

    A file that is not there or may not be read is not of that kind.
    """
    if isinstance(error, UnfinishedError):
        return True
    while error is not None:
        if isinstance(error, OSError) and error.errno in _PASSING:
            return True
        error = error.__cause__
    return False
