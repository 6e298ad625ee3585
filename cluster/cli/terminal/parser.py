"""Argument parser of all commands, with short errors that suggest the intended word."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

_INVALID_CHOICE = re.compile(r"invalid choice: '(.*?)' \(choose from (.*)\)", re.DOTALL)
_MAX_CHOICES = 12
"""Maximum number of choices that an error lists; longer lists are left out."""
RULES: dict[Any, str] = {int: "must be a whole number", float: "must be a number"}
"""Rule for an option's text in error messages, by the function that converts the text."""


class Parser(argparse.ArgumentParser):
    """Argument parser; an error shows a usage line, suggests a word and exits with code 2."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments as argparse does; errors about unknown options name the command."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command: Parser = getattr(found, "command_parser", self)
            command.error(command._unknown(unknown[0]))
        return found

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Convert an argument as argparse does; errors contain the value and the violated rule."""
        convert = self._registry_get("type", action.type, action.type)
        try:
            return convert(arg_string)
        except argparse.ArgumentTypeError as err:
            rule = str(err)
        except ValueError:
            rule = RULES.get(convert, "is not valid")
        raise argparse.ArgumentError(action, f"{arg_string!r} {rule}")

    def error(self, message: str) -> NoReturn:
        if match := _INVALID_CHOICE.search(message):
            words = re.findall(r"'([^']*)'", match[2]) or match[2].split(", ")
            shown = f", not one of {', '.join(words)}" if len(words) <= _MAX_CHOICES else ""
            rule = f"invalid choice: {match[1]!r}{shown}{suggestion(match[1], words)}"
            message = message.replace(match[0], rule)
        positional = (_shown(action) for action in self._get_positional_actions())
        words = ["usage:", self.prog, "[OPTION ...]", *positional]
        self.exit(2, f"{' '.join(words)}\n{self.prog}: error: {message} (see {self.prog} --help)\n")

    def _unknown(self, word: str) -> str:
        flag = word.partition("=")[0]
        known = [flag for action in self._actions for flag in action.option_strings]
        kind = "option" if word.startswith("-") else "argument"
        return f"unknown {kind} {flag}{suggestion(flag, known)}"


def _shown(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest)
    return f"[{name}]" if action.nargs in ("?", "*") else name


_FIELDS = {"load_profile": "profile", "tokens": "ids"}
"""Name of the option that sets a field, by field, if the names differ."""


def with_flags(message: str, args: argparse.Namespace) -> str:
    """Replace the field name at the beginning of an error with the option that sets the field.

    num_workers (0) must be at least 1 -> --workers (0) must be at least 1
    The name of a checkpoint file (config.json) is not a field.
    """
    match = re.match(r"(\w+)(?=:|\.(?!(?:json|jinja|safetensors)\b)| \(| must )", message)
    parser: argparse.ArgumentParser | None = getattr(args, "command_parser", None)
    if match is None or parser is None:
        return message
    name = _FIELDS.get(match[1], match[1].removeprefix("num_"))
    flags = {action.dest: action.option_strings for action in parser._actions}
    return message.replace(match[1], flags[name][-1], 1) if flags.get(name) else message


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return ``": did you mean --port?"``, or an empty text if no known word is close."""
    found: Sequence[str] = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f": did you mean {found[0]}?" if found else ""
