"""``config``: shows the values that ``serve`` would read from flags, variables and the file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from cluster.cli.options.option import ServeOption, parse_bytes
from cluster.cli.options.serve_config import build_config
from cluster.cli.options.serve_options import OPTIONS, Setting, add_settings, read_given_options
from cluster.cli.terminal.arguments import CommandParsers
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.cli.terminal.output import table, write_json, write_line, write_result
from cluster.launch.model_source import ModelSource

_HIDDEN = "(given, not shown)"
_DEFAULT_ORIGIN = "default"


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
    build_config(given.values, ModelSource(folder=Path(), name="model"))
    rows = [("model", given.model.value, given.model.origin)]
    for option in OPTIONS:
        setting = given.settings.get(option, Setting(option.default, _DEFAULT_ORIGIN))
        rows.append((option.dest.replace("_", "-"), _shown(option, setting), setting.origin))
    if args.json:
        keys = ("option", "value", "origin")
        options = [dict(zip(keys, row, strict=True)) for row in rows]
        write_json({"schema": 1, "options": options})
    elif args.show_origin:
        write_line(table(("OPTION", "VALUE", "ORIGIN"), [(n, _text(v), o) for n, v, o in rows]))
    else:
        import yaml  # imported here to keep other commands fast

        known = {n: v for n, v, _ in rows if v is not None and v != _HIDDEN}
        write_result(yaml.safe_dump(known, sort_keys=False))
    return ExitCode.OK


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
