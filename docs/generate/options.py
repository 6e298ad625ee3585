"""The page of the options of ``serve``, from the dataclasses of the configuration."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from cluster.cli.options.option import ServeOption, help_text
from cluster.cli.options.serve_options import OPTIONS, StartOptions
from cluster.config.cluster import section_types
from docs.generate.markdown import code, page, prose, table

_INTRODUCTION = """Every option of `serve`, `up` and `config`, by section of the configuration.
[Configuration](configuration.md) says which of several sources of a value is taken. `MODEL` is
`model` in a file and `EXPERTMESH_MODEL` in the environment."""


def options() -> str:
    """The page."""
    documents = {name: kind.__doc__ or "" for name, kind in section_types().items()}
    documents[""] = StartOptions.__doc__ or ""
    groups = itertools.groupby(OPTIONS, lambda option: option.section)
    return page(
        "Options of serve",
        _INTRODUCTION,
        *(_section(name, documents[name], found) for name, found in groups),
    )


def _section(name: str, document: str, found: Iterable[ServeOption]) -> str:
    flags = {option.field: option.flag for option in OPTIONS}
    columns = ("Option", "Key in a file", "Variable", "Value", "Default", "Means")
    rows = [
        (
            code(option.flag),
            code(option.flag.removeprefix("--")),
            code(option.variable),
            code(value_of(option)),
            code(option.shown_default),
            prose(help_text(option, flags).replace("%%", "%").partition(" (default: ")[0]) + ".",
        )
        for option in found
    ]
    first = prose(document.strip().split("\n")[0])
    return f"## {name or 'start'}\n\n{first}\n\n{table(columns, rows)}"


def value_of(option: ServeOption) -> str:
    """What a value looks like."""
    if option.is_switch:
        return "true, false"
    return ", ".join(option.choices) or (option.metavar or "").strip("{}").replace(",", ", ")
