"""Documents of measurements, which ``bench serve`` saves and ``bench compare`` reads."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import save, show


def add_save(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--save`` for a file of results."""
    text = "File to write the results to, for bench compare"
    parser.add_argument("--save", type=Path, metavar="FILE", help=text)


def document_of(
    command: str, options: Mapping[str, Any], results: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """Make a document from the options of a command and its measured results."""
    return {
        "schema": 1,
        "command": command,
        **more,
        "options": dict(options),
        "results": _rounded(results),
    }


def require_folder(file: Path | None) -> None:
    """Raise ``CommandError`` if the folder of ``file`` is not writable; None: no file.

    Called before a measurement, so that its results are not lost.
    """
    if file is not None and not os.access(file.parent, os.W_OK):
        raise CommandError(ExitCode.USAGE, f"cannot write {file}: its folder does not exist")


def show_and_save(args: argparse.Namespace, document: Mapping[str, Any], text: str) -> None:
    """Print the document (``--json``) or the text; with ``--save``, also write the document."""
    show(args, document, text)
    if args.save is not None:
        save(args.save, json.dumps(document, indent=1) + "\n")


def iter_values(document: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, float]]:
    """Yield name and value of each number in nested results; a name is the keys, joined by dots."""
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from iter_values(value, f"{inside}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{inside}{key}", float(value)


def format_number(value: float | None, digits: int = 2) -> str:
    """Format a number with ``digits`` decimal places; ``-`` for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def _rounded(value: Any) -> Any:
    """Round every measured number to six significant digits, more than the resolution of clocks."""
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
