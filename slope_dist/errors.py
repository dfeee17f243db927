"""The one error class a user is meant to see.

Everything that a user can put right (a config, a file, a folder, a command line) raises `UserError`; entry points print
it as one line and exit with code 2. Anything else that is raised is a defect of ours and keeps its traceback.
"""

EXIT_BAD_INPUT = 2


class UserError(Exception):
    """What is wrong, where, and what would be right, in one line."""
