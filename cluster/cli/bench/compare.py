"""``bench compare``: compares two saved documents of one bench command, or two servers."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.cli.bench.document import iter_values
from cluster.cli.bench.side_by_side import measure_both
from cluster.cli.bench.workload_options import add_workload_options
from cluster.cli.terminal.arguments import CommandParsers, Number, count
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import note, show, table

_HIGHER = ("_per_s", "successful")
_LOWER = ("_ms", "_us", "_s", "failed", "failures", "unfinished", "_bytes")
"""Endings of value names: lower is better for ``_LOWER``, higher for ``_HIGHER``."""
_COMMANDS = ("bench ", "benchmarks.")
"""Prefixes of the names of commands that save documents for a comparison."""


@dataclass(frozen=True, slots=True)
class ValueChange:
    """A measured value in two documents, before and after."""

    name: str
    """Path of the value in the document: nested keys joined by dots."""
    before: float
    after: float

    @property
    def better(self) -> str:
        """``higher``, ``lower`` or ``neither``: direction in which the value is better.

        The innermost part of the name that has a known ending decides.
        """
        if self.name.startswith("sent_late_ms."):  # a property of the client
            return "neither"
        for name in reversed(self.name.split(".")):
            if name.endswith(_HIGHER):
                return "higher"
            if name.endswith(_LOWER):
                return "lower"
        return "neither"

    @property
    def ratio(self) -> float:
        """``after`` divided by ``before``."""
        if self.before == self.after:
            return 1.0
        return self.after / self.before if self.before else math.inf

    def is_worse(self, threshold: float) -> bool:
        """Whether the value got worse by more than the factor ``threshold``."""
        if self.better == "higher":
            return self.ratio * threshold < 1.0
        return self.better == "lower" and self.ratio > threshold


def add_command(kinds: CommandParsers) -> None:
    text = "compare two saved documents, or two servers under equal load; exit with 1 if B is worse"
    parser = kinds.add("compare", run, text)
    for name, what in (
        ("A", "Document of --save or --json, or URL of a server"),
        ("B", "Document or URL to compare with A"),
    ):
        parser.add_argument(name.lower(), metavar=f"{name}.json|URL", help=what)
    text = "Factor by which a value of B must be worse than that of A to count as worse"
    ratio = Number(kind=float, rule="must be a number, 1 or more", low=1, high=1e300)
    parser.add_argument("--threshold", type=ratio, default=1.05, metavar="NUMBER", help=text)
    text = "Number of parts of the load; each part runs on A and B, in alternating order"
    parser.add_argument("--rounds", type=count, default=2, help=text)
    parser.add_argument("--b-api-key", metavar="TEXT", help="API key of B (default: none)")
    parser.add_argument("--b-model", metavar="NAME", help="Model to use at B (default: that of A)")
    add_workload_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the ratio of every value; return the exit code.

    The exit code is 1 if a value got worse by more than the threshold, and 130 after Ctrl-C.
    """
    are_servers = [_is_url(name) for name in (args.a, args.b)]
    if any(are_servers) != all(are_servers):
        raise CommandError(ExitCode.USAGE, "give two files or two URLs")
    before, after = measure_both(args) if all(are_servers) else _read_both(args)
    found = changes(before["results"], after["results"])
    worse = [change.name for change in found if change.is_worse(args.threshold)]
    document = _document(before["command"], found, args.threshold)
    heads = ("A", "B") if all(are_servers) else ("BEFORE", "AFTER")
    show(args, document, _text(found, args.threshold, heads))
    if before.get("interrupted"):
        return ExitCode.INTERRUPTED
    if not args.json:
        note(f"worse by more than {args.threshold:g}: {', '.join(worse) or 'nothing'}")
    return ExitCode.FAILED if worse else ExitCode.OK


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def _read_both(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    before, after = _read(Path(args.a)), _read(Path(args.b))
    if before["command"] != after["command"]:
        message = f"{before['command']} and {after['command']} are different commands"
        raise CommandError(ExitCode.REFUSED, message)
    _note_differences(before["options"], after["options"])
    return before, after


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[ValueChange]:
    """Pair the values of two documents. A failure count that a document lacks is 0."""
    old, new = dict(iter_values(before)), dict(iter_values(after))
    counter = "failures."  # counts by error code; a missing one is 0
    shared = [n for n in {**old, **new} if n.startswith(counter) or (n in old and n in new)]
    return [ValueChange(name, old.get(name, 0.0), new.get(name, 0.0)) for name in shared]


def _read(path: Path) -> dict[str, Any]:
    """Read a saved document of a bench command. Raises ``CommandError``."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        is_ours = document["schema"] == 1 and str(document["command"]).startswith(_COMMANDS)
        if not (is_ours and document["options"].keys() and document["results"].keys()):
            raise ValueError("it is not a bench document")
    except OSError as err:
        raise CommandError(ExitCode.USAGE, f"cannot read {path}: {err.strerror}") from err
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        message = f"{path} was not saved by a bench command"
        raise CommandError(ExitCode.USAGE, message) from err
    found: dict[str, Any] = document
    return found


def _note_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old != new:
            note(f"expertmesh: not the same {name}: {old} and {new}")


def _document(command: str, found: list[ValueChange], threshold: float) -> dict[str, Any]:
    """Make the document of ``bench compare``. JSON has no infinity: an infinite ratio is null."""
    numbers = {
        change.name: {
            "before": change.before,
            "after": change.after,
            "ratio": change.ratio if math.isfinite(change.ratio) else None,
            "better": change.better,
            "worse": change.is_worse(threshold),
        }
        for change in found
    }
    return {
        "schema": 1,
        "command": "bench compare",
        "of": command,
        "threshold": threshold,
        "worse": any(number["worse"] for number in numbers.values()),
        "numbers": numbers,
    }


def _text(found: list[ValueChange], threshold: float, heads: tuple[str, str]) -> str:
    rows = [
        (
            change.name,
            f"{change.before:.6g}",
            f"{change.after:.6g}",
            f"{change.ratio:.3f}",
            "-" if change.better == "neither" else change.better,
            "WORSE" if change.is_worse(threshold) else "",
        )
        for change in found
    ]
    return table(("NUMBER", *heads, "RATIO", "BETTER IS", ""), rows)
