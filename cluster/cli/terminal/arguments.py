"""Registration of commands, and arguments that several commands share."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

Kind = TypeVar("Kind", int, float)


class _HelpFormatter(argparse.HelpFormatter):
    """Help formatter that shows the type of a value without metavar, and appends defaults."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kind = action.type.kind if isinstance(action.type, Number) else action.type
        names: dict[object, str] = {int: "N", float: "NUMBER", Path: "FILE"}
        return names.get(kind, "TEXT")

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        has_none = default in (None, argparse.SUPPRESS, []) or isinstance(default, bool)
        if has_none or "(default" in text:
            return text
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        return f"{text} (default: {shown})"


class CommandParsers:
    """Registry of the commands of one level; every command gets the arguments of ``common``."""

    def __init__(self, subparsers: Any, common: argparse.ArgumentParser) -> None:
        """``subparsers``: result of ``ArgumentParser.add_subparsers``."""
        self._subparsers = subparsers
        self._common = common
        self.lines: list[str] = []
        """A line of help for each registered command."""

    def add(
        self, name: str, run: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        """Add a command; ``run`` executes it and returns its exit code. ``text``: help."""
        parser = self._add(name, text, parents=[self._common])
        parser.set_defaults(run=run, command_parser=parser)
        return parser

    def add_group(self, name: str, text: str) -> CommandParsers:
        """Add a command that has subcommands; return the registry of the subcommands."""
        parser = self._add(name, text)
        return CommandParsers(parser.add_subparsers(metavar="WHAT", required=True), self._common)

    def _add(self, name: str, text: str, **options: Any) -> argparse.ArgumentParser:
        self.lines.append(f"  {name:<12}{text}")
        parser: argparse.ArgumentParser = self._subparsers.add_parser(
            name, help=text, description=text, formatter_class=_HelpFormatter, **options
        )
        return parser


@dataclass(frozen=True, kw_only=True, slots=True)
class Number(Generic[Kind]):
    """Converts an option's text to a number from ``low`` to ``high``, both inclusive."""

    kind: type[Kind]
    rule: str
    """Rule that a text must satisfy, as error messages state it."""
    low: float = -math.inf
    high: float = math.inf

    def __call__(self, text: str) -> Kind:
        """Convert a text to a number. Raises ``argparse.ArgumentTypeError`` with the rule."""
        with contextlib.suppress(ValueError):
            value = self.kind(text)
            if self.low <= value <= self.high and text.isascii() and "_" not in text:
                return value
        raise argparse.ArgumentTypeError(self.rule)


MAX_COUNT = 2**31 - 1
_LEAST = math.ulp(0.0)
_MAX_S = 1e9
"""Longest time limit in seconds; sockets and events reject slightly larger numbers."""
positive = Number(kind=float, rule="must be a number above 0", low=_LEAST, high=1e300)
positive_or_inf = Number(kind=float, rule="must be a number above 0, or inf", low=_LEAST)
not_negative = Number(kind=float, rule="must be a number, 0 or more", low=0, high=1e300)
fraction_or_0 = Number(kind=float, rule="must be from 0 to 1", low=0, high=1)
fraction = Number(kind=float, rule="must be above 0 and at most 1", low=_LEAST, high=1)
seconds = Number(
    kind=float, rule="must be above 0 and at most 1e9 seconds", low=_LEAST, high=_MAX_S
)
count = Number(
    kind=int, rule=f"must be a whole number from 1 to {MAX_COUNT}", low=1, high=MAX_COUNT
)
count_or_0 = Number(
    kind=int, rule=f"must be a whole number from 0 to {MAX_COUNT}", high=MAX_COUNT, low=0
)


def add_wait_option(
    parser: argparse.ArgumentParser, default: float | None, shown: str = "no limit"
) -> None:
    """Add ``--wait``; ``shown``: text in the help for a default of None or infinity."""
    text = "Longest wait for the end of the operation; 0 returns immediately"
    if default is None or default == math.inf:
        text += f" (default: {shown})"
    kind = Number(kind=float, rule="must be a number of seconds, 0 or more", low=0)
    parser.add_argument("--wait", type=kind, default=default, metavar="SECONDS", help=text)


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--model``, for commands that call the gateway."""
    parser.add_argument("--model", metavar="NAME", help="Model to use (default: the served one)")


def add_served_model_option(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--model``, for commands that show or change the workers of one model."""
    text = "Model to show or change, where several are served (default: the first)"
    parser.add_argument("--model", metavar="NAME", help=text)


def add_address_option(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--address``, for commands that can use Ray."""
    text = "Ray cluster to use instead of the admin port; auto: the one on this host"
    parser.add_argument("--address", metavar="ADDRESS", help=text)
