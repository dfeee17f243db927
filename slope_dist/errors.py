"""The one error class a user is meant to see.

Everything that a user can put right (a config, a file, a folder, a command line) raises `UserError`; entry points print
it as one line and exit with code 2. Anything else that is raised is a defect of ours and keeps its traceback.
"""

EXIT_BAD_INPUT = 2

EXIT_STOPPED = 75
"""Of a run that was asked to stop, and can go on: what sysexits.h calls a temporary failure."""

EXIT_HUNG = 137
"""Of ranks that are killed because the run hangs, as shells count (128 + SIGKILL): they cannot leave by themselves."""


class UserError(Exception):
    """What is wrong, where, and what would be right, in one line."""


class UnfinishedError(UserError):
    """What stopped the work is not in its input: the same may succeed later, or go on where it was."""
