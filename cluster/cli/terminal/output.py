"""Output of commands: results on stdout, messages on stderr."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.disk.files import replace_file

_SHADES = (236, 17, 18, 19, 20, 26, 32, 38)
"""Colours of a 256-colour terminal, from grey to light blue."""
_CODES = {"red": 31, "green": 32, "yellow": 33, "dim": 2}


def write_result(text: str) -> None:
    """Write a part of the result to stdout and flush it. Characters that the encoding of stdout
    lacks are written as escapes.

    Raises ``BrokenPipeError``, and ``CommandError`` for other errors such as a full disk.
    """
    try:
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError as err:
            sys.stdout.write(text.encode(err.encoding, "backslashreplace").decode(err.encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as err:
        discard_stdout()
        reason = f"the output cannot be written: {err.strerror}"
        raise CommandError(ExitCode.FAILED, reason) from err


def discard_stdout() -> None:
    """Discard all further output to stdout, including the buffer that is written at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_line(text: str) -> None:
    """Write one line of the command's result to stdout."""
    write_result(f"{text}\n")


def write_json(document: Any) -> None:
    """Write the command's result to stdout as one JSON document."""
    write_line(json.dumps(document, indent=1))


def show(
    args: argparse.Namespace, document: Any, text: str | Callable[[], str], heading: str = ""
) -> ExitCode:
    """Print the command's result: with ``--json`` the document, else the text.

    ``heading``: line on stderr before the text. ``text`` is a function if it is expensive to make.
    Returns ``OK``.
    """
    if args.json:
        write_json(document)
    else:
        if heading:
            note(heading)
        write_line(text if isinstance(text, str) else text())
    return ExitCode.OK


def save(path: Path, text: str, what: str = "") -> None:
    """Write a file and report that on stderr; ``what`` describes the content.

    Raises ``CommandError``; an existing file then keeps its old content.
    """
    try:
        replace_file(path, text.encode())
    except OSError as err:
        raise CommandError(ExitCode.FAILED, f"cannot write {path}: {err.strerror}") from err
    note(f"wrote {path}{what}")


def note(text: str) -> None:
    """Write one line to stderr."""
    write_message(sys.stderr, f"{text}\n")


def write_message(stream: TextIO, text: str) -> None:
    """Write to a stream and flush; errors, as on a full disk, are ignored."""
    with contextlib.suppress(OSError):
        stream.write(text)
        stream.flush()


def has_colours(allowed: bool) -> bool:
    """Return whether stdout is a terminal, ``NO_COLOR`` is unset, and colours are ``allowed``."""
    return allowed and not os.environ.get("NO_COLOR") and sys.stdout.isatty()


def colour(text: str, name: str, allowed: bool) -> str:
    """Add the terminal codes of a colour to ``text`` if ``allowed``."""
    return f"\x1b[{_CODES[name]}m{text}\x1b[0m" if has_colours(allowed) else text


def shade(text: str, share: float) -> str:
    """Add a background to ``text`` whose strength grows with ``share`` (0 to 1)."""
    ground = _SHADES[min(int(share * len(_SHADES)), len(_SHADES) - 1)]
    return f"\x1b[38;5;231;48;5;{ground}m{text}\x1b[0m"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format a table whose columns are as wide as their widest cell."""
    cells = [[str(c) for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def time_of_day(seconds: float) -> str:
    """Format seconds since 1970 as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
