"""The page of the command line, from the parsers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from cluster.cli.main import make_parser
from docs.generate.markdown import code, page, prose, table

EVERYWHERE = "everywhere"
"""Title of the options that every command has."""
SETTINGS = ("serve", "up", "config")
"""Commands with the options of the configuration, which have a page of their own."""
_USUAL = {"positional arguments", "options", EVERYWHERE}
_INTRODUCTION = """Every command and option of `expertmesh`. [Commands](commands.md) explains what
they do and how they end; options of the cluster itself, which `serve`, `up` and `config` take, are
on [Options of serve](options.md)."""


def command_line() -> str:
    """The page."""
    parser = make_parser()
    common = next(group for group in parser._action_groups if group.title == EVERYWHERE)
    commands = [_section(name, one) for name, one in leaves(parser)]
    shared = f"## Every command\n\n{_options(parser, common._group_actions)}"
    return page("Command line", _INTRODUCTION, shared, *commands)


def leaves(
    parser: argparse.ArgumentParser, prefix: str = ""
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command that runs, by its name with those above it."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        yield prefix.strip(), parser
    for group in groups:
        for name, below in group.choices.items():
            yield from leaves(below, f"{prefix} {name}")


def _section(name: str, parser: argparse.ArgumentParser) -> str:
    is_setting = name in SETTINGS
    hidden = {EVERYWHERE, *(_sections_of(parser) if is_setting else ())}
    groups = [group for group in parser._action_groups if group.title not in hidden]
    actions = [action for group in groups for action in group._group_actions]
    positionals = [_value(parser, a) for a in actions if not a.option_strings]
    usage = code(" ".join(["expertmesh", name, *positionals]))
    more = "And all of [Options of serve](options.md)." if is_setting else ""
    parts = [
        f"## {name}",
        f"{usage}: {prose(parser.description or '')}.",
        _options(parser, actions),
    ]
    return "\n\n".join(filter(None, [*parts, more]))


def _sections_of(parser: argparse.ArgumentParser) -> set[str]:
    """Titles of the groups that stand for sections of the configuration."""
    return {group.title or "" for group in parser._action_groups} - _USUAL


def _options(parser: argparse.ArgumentParser, actions: list[argparse.Action]) -> str:
    formatter = parser._get_formatter()
    rows = [
        (_spelling(parser, action), prose(formatter._expand_help(action)))
        for action in actions
        if not isinstance(action, argparse._HelpAction)
    ]
    return table(("Argument", "Means"), rows)


def _spelling(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    names = ", ".join(action.option_strings)
    return code(f"{names} {_value(parser, action)}".strip())


def _value(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """What stands for the value, as argparse shows it; empty for a switch."""
    formatter = parser._get_formatter()
    default = formatter._get_default_metavar_for_optional(action)
    return formatter._format_args(action, default if action.option_strings else action.dest)
