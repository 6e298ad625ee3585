"""``config``: what ``serve`` or ``up`` would take with these flags, variables and file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from cluster.cli.options.option import ServeOption, parse_bytes
from cluster.cli.options.serve_config import build_config
from cluster.cli.options.serve_options import (
    OPTIONS,
    Setting,
    add_settings,
    collect,
    find_settings,
    wanted_model,
)
from cluster.cli.terminal.arguments import Commands
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.cli.terminal.output import out, out_json, out_line, table
from cluster.launch.model_source import ModelSource

_HIDDEN = "(given, not shown)"
_NOBODY = "default"


def add_commands(commands: Commands) -> None:
    parser = commands.add("config", run, "values that serve would take; starts nothing")
    parser.add_argument(
        "--show-origin",
        action="store_true",
        help="say where each value comes from: flag, variable, file or default",
    )
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Print them, as a file for ``--config`` without ``--show-origin``.

    Raises ``CommandError`` where ``serve`` would.
    """
    values = collect(args, os.environ)
    build_config(values, ModelSource(folder=Path(), name="model"))
    found = find_settings(args, os.environ)
    given = {o: _shown(o, found.get(o) or Setting(o.default, _NOBODY)) for o in OPTIONS}
    model = wanted_model(args, os.environ)
    rows = [("model", model, _origin_of_model(args)), *((o.dest, *v) for o, v in given.items())]
    rows = [(name.replace("_", "-"), value, origin) for name, value, origin in rows]
    if args.json:
        keys = ("option", "value", "origin")
        options = [dict(zip(keys, row, strict=True)) for row in rows]
        out_json({"schema": 1, "options": options})
    elif args.show_origin:
        out_line(table(("OPTION", "VALUE", "ORIGIN"), [(n, _text(v), o) for n, v, o in rows]))
    else:
        import yaml  # other commands start without it

        known = {n: v for n, v, _ in rows if v is not None and v != _HIDDEN}
        out(yaml.safe_dump(known, sort_keys=False))
    return ExitCode.OK


def _shown(option: ServeOption, setting: Setting) -> tuple[Any, str]:
    """Value and origin, fit to be shown."""
    value = setting.value
    if option.is_secret:
        value = _HIDDEN if value else None
    if isinstance(value, float) and option.kind is parse_bytes:
        value = int(value)
    if isinstance(value, tuple):
        value = ",".join(map(str, value)) or None
    return value, setting.origin


def _origin_of_model(args: argparse.Namespace) -> str:
    if args.model:
        return "MODEL"
    if os.environ.get("EXPERTMESH_MODEL"):
        return "EXPERTMESH_MODEL"
    return args.config if wanted_model(args, {}) else "default: the bundled checkpoint"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "-" if value is None else str(value)
