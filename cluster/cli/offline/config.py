"""``config``: shows the values that ``serve`` would read from flags, variables and the file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.cli.options.option import ServeOption, parse_bytes
from cluster.cli.options.serve_config import build_configs
from cluster.cli.options.serve_options import (
    OPTIONS,
    GivenModel,
    GivenOptions,
    Setting,
    add_settings,
    read_given_options,
)
from cluster.cli.terminal.arguments import CommandParsers
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.cli.terminal.output import table, write_json, write_line, write_result
from cluster.launch.model_source import ModelSource

_HIDDEN = "(given, not shown)"
_DEFAULT_ORIGIN = "default"
_Row = tuple[str, Any, str]
"""Name of an option, its value, and the origin of the value."""


def add_commands(commands: CommandParsers) -> None:
    parser = commands.add("config", run, "show the values that serve would use; starts nothing")
    text = "Show the origin of each value: flag, variable, file or default"
    parser.add_argument("--show-origin", action="store_true", help=text)
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Print the values; without ``--show-origin`` in the format of a file for ``--config``.

    Raises ``CommandError`` for values that ``serve`` would reject.
    """
    given = read_given_options(args, os.environ)
    numbers = range(len(given.models))
    build_configs(given.models, [ModelSource(folder=Path(), name=f"model-{i}") for i in numbers])
    rows = [_row(option, given.settings) for option in OPTIONS]
    lists: list[list[_Row]] = []
    if len(given.models) == 1:
        rows.insert(0, _model_row(given.models[0]))
    else:
        lists = [[_model_row(one), *_own_rows(one, given)] for one in given.models]
    if args.json:
        models = {"models": [list(map(_document, own)) for own in lists]} if lists else {}
        write_json({"schema": 1, "options": list(map(_document, rows)), **models})
    elif args.show_origin:
        shown = [*rows, *(row for own in lists for row in own)]
        write_line(table(("OPTION", "VALUE", "ORIGIN"), [(n, _text(v), o) for n, v, o in shown]))
    else:
        import yaml  # imported here to keep other commands fast

        known: dict[str, Any] = _known(rows)
        if lists:
            known["models"] = list(map(_known, lists))
        write_result(yaml.safe_dump(known, sort_keys=False))
    return ExitCode.OK


def _model_row(given: GivenModel) -> _Row:
    return "model", given.model.value, given.model.origin


def _own_rows(given: GivenModel, shared: GivenOptions) -> Iterator[_Row]:
    """Yield the options that a model of several has of its own."""
    for option, setting in given.settings.items():
        if shared.settings.get(option) != setting:
            yield _row(option, given.settings)


def _row(option: ServeOption, settings: Mapping[ServeOption, Setting]) -> _Row:
    setting = settings.get(option, Setting(option.default, _DEFAULT_ORIGIN))
    return option.dest.replace("_", "-"), _shown(option, setting), setting.origin


def _document(row: _Row) -> dict[str, Any]:
    return dict(zip(("option", "value", "origin"), row, strict=True))


def _known(rows: Iterable[_Row]) -> dict[str, Any]:
    return {name: value for name, value, _ in rows if value is not None and value != _HIDDEN}


def _shown(option: ServeOption, setting: Setting) -> Any:
    """Return the value of an option as text or number; a secret is replaced."""
    value = setting.value
    if option.is_secret:
        value = _HIDDEN if value else None
    if isinstance(value, float) and option.kind is parse_bytes:
        value = int(value)
    if isinstance(value, tuple):
        value = ",".join(map(str, value)) or None
    return value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "-" if value is None else str(value)
