"""Text that commands read from stdin."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from cluster.cli.terminal.exit_codes import CommandError, ExitCode


def is_terminal() -> bool:
    """Return whether stdin is a terminal; False if it is closed."""
    return sys.stdin is not None and sys.stdin.isatty()


def read_stdin() -> str:
    """Return all text of stdin. Raises ``CommandError`` if it is closed or not text."""
    return "".join(stdin_lines())


def stdin_lines() -> Iterator[str]:
    """Yield the lines of stdin. Raises ``CommandError`` if it is closed or not text."""
    if sys.stdin is None:
        raise CommandError(ExitCode.USAGE, "stdin is closed")
    try:
        yield from sys.stdin
    except UnicodeDecodeError as err:
        raise CommandError(ExitCode.USAGE, f"stdin is not {err.encoding} text: {err}") from err
