"""The options of ``serve``, made from the dataclasses of the configuration.

The name, default and type of a field determine the name, default and parser of its option. The
docstring below the field is the help.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cluster.cli.terminal.parser import RULES
from cluster.config.option_metadata import BARE, FLAG

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_METAVARS = {
    "SECONDS": "s timeout",
    "MILLISECONDS": "ms",
    "BYTES": "bytes",
    "TOKENS": "tokens len",
    "PORT": "port proxy",
    "HOST": "host",
    "FILE": "file profile template cert key ca",
    "FOLDER": "dir",
    "FOLDERS": "roots",
    "URL": "endpoint",
    "NAME": "name",
    "ORIGINS": "origins",
    "ADDRESS": "address",
    "ADDRESSES": "ips",
    "PATH": "path",
    "NAME=FOLDER": "modules",
}
"""Last words of field names, by the metavar that the help shows for fields with such names."""
_BYTES = re.compile(r"([+-]?\d+(?:\.\d+)?(?=[KMGT])|[+-]?\d+)([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Parse a number of bytes: ``4096``, ``64M``, ``2GiB``. Raises ``ValueError``."""
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text} is not a number of bytes")
    number, unit = match[1], match[2].upper()
    size = float(number) * _UNITS[unit] if unit else int(number)
    if size in (math.inf, -math.inf):
        raise ValueError(f"{text} is not a number of bytes")
    return int(size)


_SWITCH = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def _parse_switch(text: str) -> bool:
    if text.lower() not in _SWITCH:
        raise ValueError(f"{text} is neither true nor false")
    return _SWITCH[text.lower()]


def _parse_word_of_switch(text: str) -> str:
    """Parse a choice; ``true``, ``yes`` and ``1`` mean ``on``, their opposites ``off``."""
    return {True: "on", False: "off", None: text}[_SWITCH.get(text.lower())]


def _parse_word_or_number(text: str) -> str | int:
    return text if text.isalpha() else int(text)


def _parse_words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


_RULES: Mapping[Callable[[str], Any], str] = {
    **RULES,
    parse_bytes: "must be a number of bytes, such as 4096, 64M or 8GiB",
    _parse_switch: "must be true or false",
    _parse_word_or_number: "must be a word or a whole number",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOption:
    """One option of ``serve``."""

    flag: str
    """Command-line flag of the option, including the dashes."""
    section: str
    """Section of the configuration; empty for options that only the launcher uses."""
    field: str
    """Name of the option's field in the section."""
    help: str
    """Help text: docstring of the option's field."""
    default: Any
    """Default of the option's field; None if the field has no default."""
    kind: Callable[[str], Any]
    """Function that converts text to a value; raises ``ValueError``."""
    choices: tuple[str, ...]
    """Allowed values of the option; empty if any text is allowed."""
    metavar: str | None
    """Placeholder for the value in the help; None for a switch and for an option with choices."""
    is_secret: bool
    """Whether the value is a secret, which is never shown; every command has such an option."""
    bare: str
    """Value of the option if the flag is given without a value; empty if a value is required."""

    @property
    def target(self) -> str:
        """Key of the option's value: ``section.field``, or the field alone without a section."""
        return f"{self.section}.{self.field}" if self.section else self.field

    @property
    def dest(self) -> str:
        """Name of the option's attribute in argparse's result."""
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def key(self) -> str:
        """Name of the option in the file of ``--config``."""
        return self.flag.removeprefix("--")

    @property
    def variable(self) -> str:
        """Name of the option's environment variable."""
        return f"EXPERTMESH_{self.dest.upper()}"

    @property
    def is_switch(self) -> bool:
        """Whether the option is a flag without a value."""
        return self.kind is _parse_switch

    def is_value(self, text: str) -> bool:
        """Return whether a text is a value of this option: one of its choices, or a number.

        A choice may be spelled differently, such as ``true`` for ``on``.
        """
        return self.kind(text) in self.choices if self.choices else text.isdecimal()

    @property
    def rule(self) -> str:
        """Rule that a text must satisfy to be a value, as error messages state it."""
        if self.choices:
            return f"must be one of {', '.join(self.choices)}"
        return _RULES.get(self.kind, "is not valid")

    def parse(self, text: str) -> Any:
        """Convert a text to a value. Raises ``argparse.ArgumentTypeError`` with the rule."""
        try:
            return self.kind(text)
        except ValueError as err:
            raise argparse.ArgumentTypeError(self.rule) from err

    @property
    def is_path(self) -> bool:
        """Whether the value is a path."""
        return self.metavar in ("FILE", "FOLDER")

    @property
    def shown_default(self) -> str:
        """Default of the option as text; empty if the default is None or empty."""
        if self.is_switch:
            return "on" if self.default else "off"
        if self.kind is parse_bytes and self.default:
            return _bytes_text(int(self.default))
        if isinstance(self.default, float):
            return f"{self.default:.12g}"
        if isinstance(self.default, tuple):
            return ",".join(self.default)
        return "" if self.default is None else str(self.default)


def _bytes_text(number: int) -> str:
    unit = next(unit for unit in "TGMK" if number % _UNITS[unit] == 0 or unit == "K")
    return f"{number // _UNITS[unit]}{unit}" if number % _UNITS[unit] == 0 else str(number)


def make_options(section: str, kind: type) -> tuple[ServeOption, ...]:
    """Make the options for the fields of a dataclass, except internal fields."""
    docs, hints = dict(_docstrings(kind)), get_type_hints(kind)
    return tuple(
        _option(section, field, hints[field.name], docs[field.name])
        for field in dataclasses.fields(kind)
        if field.metadata.get(FLAG) != ""
    )


def _option(section: str, field: dataclasses.Field[Any], hint: Any, text: str) -> ServeOption:
    (kind_of, *others) = [t for t in get_args(hint) or (hint,) if t is not NoneType]
    is_literal = get_origin(hint) is Literal
    is_secret = not field.repr
    choices = get_args(hint) if is_literal else ()
    if is_secret:
        kind: Callable[[str], Any] = str
    elif is_literal:
        kind = str if all(isinstance(c, str) for c in choices) else _parse_word_or_number
        kind = _parse_word_of_switch if {"on", "off"} <= set(choices) else kind
    elif "bytes" in field.name.split("_"):
        kind = parse_bytes
    else:
        kind = {bool: _parse_switch}.get(kind_of, _parse_words if others else kind_of)
    words = choices if kind in (str, _parse_word_of_switch) else ()
    return ServeOption(
        flag=field.metadata.get(FLAG) or f"--{field.name.replace('_', '-')}",
        section=section,
        field=field.name,
        help=text,
        default=None if field.default is dataclasses.MISSING else field.default,
        kind=kind,
        choices=words,
        metavar=_metavar(field.name, kind_of, kind, choices),
        is_secret=is_secret,
        bare=field.metadata.get(BARE, "on" if kind is _parse_word_of_switch else ""),
    )


def _metavar(name: str, hint: Any, kind: Any, choices: tuple[Any, ...]) -> str | None:
    if choices or kind is _parse_switch:
        return f"{{{','.join(map(str, choices))}}}" if kind is _parse_word_or_number else None
    last = "bytes" if "bytes" in name else name.split("_")[-1]
    found = next((m for m, words in _METAVARS.items() if last in words.split()), None)
    return found or {int: "N", float: "NUMBER"}.get(hint, "TEXT")


def _docstrings(kind: type) -> Iterator[tuple[str, str]]:
    """Yield name and docstring of each field of a class, read from the source code."""
    tree = ast.parse(inspect.getsource(sys.modules[kind.__module__]))
    body = next(
        n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == kind.__name__
    )
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(field.target, ast.Name)
            yield field.target.id, " ".join(ast.literal_eval(below.value).split())


def help_text(option: ServeOption, flags: Mapping[str, str]) -> str:
    """Return the argparse help of an option: its docstring, and the default.

    Names of fields in the docstring become flags (``flags``: flag by field).
    """
    text = re.sub(r"``(.+?)``", lambda m: flags.get(m[1], m[1]), option.help).removesuffix(".")
    shown = option.shown_default
    return (f"{text} (default: {shown})" if shown else text).replace("%", "%%")
