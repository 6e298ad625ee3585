"""How commands are registered, and the arguments that several of them have."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any


class _HelpFormatter(argparse.HelpFormatter):
    """Names a value by its type where no metavar does, and shows the default."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", count: "N", float: "NUMBER", Path: "FILE"}.get(action.type, "TEXT")

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        has_none = default in (None, argparse.SUPPRESS, []) or isinstance(default, bool)
        if has_none or "(default" in text:
            return text
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        return f"{text} (default: {shown})"


class Commands:
    """Commands of one level. All have the arguments of ``common``."""

    def __init__(self, subparsers: Any, common: argparse.ArgumentParser) -> None:
        """``subparsers`` is what ``ArgumentParser.add_subparsers`` returns."""
        self._subparsers = subparsers
        self._common = common
        self.lines: list[str] = []
        """A line of help for each registered command."""

    def add(
        self, name: str, run: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        """A command; ``run`` returns its exit code."""
        parser = self._add(name, text, parents=[self._common])
        parser.set_defaults(run=run, command_parser=parser)
        return parser

    def add_group(self, name: str, text: str) -> Commands:
        """Add a command that has subcommands; returns their registry."""
        parser = self._add(name, text)
        return Commands(parser.add_subparsers(metavar="WHAT", required=True), self._common)

    def _add(self, name: str, text: str, **options: Any) -> argparse.ArgumentParser:
        self.lines.append(f"  {name:<12}{text}")
        parser: argparse.ArgumentParser = self._subparsers.add_parser(
            name, help=text, description=text, formatter_class=_HelpFormatter, **options
        )
        return parser


def positive(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a whole number above 0")
    return int(text)


def add_wait_option(
    parser: argparse.ArgumentParser, default: float | None, shown: str = "no limit"
) -> None:
    """``--wait``: how long the command waits; ``shown`` describes a default of None or infinity."""
    text = "longest wait for the end, 0 returns at once"
    if default is None or default == math.inf:
        text += f" (default: {shown})"
    parser.add_argument("--wait", type=_not_negative, default=default, metavar="SECONDS", help=text)


def _not_negative(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return value


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """``--model``, for commands that call the gateway."""
    parser.add_argument("--model", metavar="NAME", help="served model (default: the only one)")


def add_address_option(parser: argparse.ArgumentParser) -> None:
    """``--address``, for commands that can go through Ray."""
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        help="go through this Ray (auto: the one on this host), not through the admin port",
    )
