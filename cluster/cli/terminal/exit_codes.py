"""Exit codes of every command, and the errors that end a command with one of them."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit status of a command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_READY = 4
    """The server or cluster is not ready, or a time limit has passed."""
    REFUSED = 5
    """A precondition of the command does not hold; nothing was changed."""
    UNAUTHORISED = 6
    INTERRUPTED = 130


class CommandError(Exception):
    """Error that ends the command with one line on stderr and the exit code ``code``."""

    def __init__(self, code: ExitCode, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message
