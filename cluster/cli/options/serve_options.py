"""Reads the options of ``serve`` and ``up`` from flags, the environment and a file.

Flags override the environment, which overrides the file; otherwise the default applies.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.cli.options.config_file import ConfigFile, read_config_file
from cluster.cli.options.option import ServeOption, help_text, make_options
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.parser import suggestion, with_flags
from cluster.config.api_keys import hash_key
from cluster.config.cluster import section_types
from cluster.core.checks import check_each, is_not_negative, is_positive
from cluster.core.errors import CheckpointError
from cluster.launch.plan import START_LIMIT_S


@dataclass(frozen=True, kw_only=True, slots=True)
class StartOptions:
    """How a cluster is started. Two starts of the same cluster may differ in these."""

    address: str | None = None
    """Address of a Ray cluster to join instead of starting a private one (RAY_ADDRESS)."""
    wait_nodes: int = 0
    """Number of nodes in the joined Ray cluster to wait for before the workers start."""
    start_timeout: float = START_LIMIT_S
    """Time limit of the whole start, in seconds."""

    def __post_init__(self) -> None:
        check_each(self, "wait_nodes", is_not_negative, "must not be negative")
        check_each(self, "start_timeout", is_positive, "must be above 0")


_SECTIONS: dict[str, type] = {**section_types(), "": StartOptions}
_PREFIX = "EXPERTMESH_"
_VARIABLES = {
    f"{_PREFIX}{name}"
    for name in (
        *("MODEL", "URL", "ADMIN_URL", "NAME", "API_KEY", "ADMIN_KEY"),
        *("CA_CERT", "CLIENT_CERT", "CLIENT_KEY", "MAX_INSTRUCTIONS", "PARENT"),
    )
}
"""Environment variables of expertmesh that are not options of ``serve``."""
_KUBERNETES_VARIABLE = re.compile(r"_SERVICE_(HOST|PORT\w*)$|_PORT(_\d+_(TCP|UDP)\w*)?$")
"""Pattern of variables that Kubernetes sets for Services such as ``expertmesh-gateway``."""
_MODULES = "--lora-modules"
"""Flag ``--lora-modules``, the only option that takes several values."""
_KEY_VARIABLES = {
    "gateway.api_keys": "EXPERTMESH_API_KEYS",
    "gateway.admin_keys": "EXPERTMESH_ADMIN_KEYS",
}
OPTIONS = tuple(option for name, kind in _SECTIONS.items() for option in make_options(name, kind))
"""All options of ``serve``, from every section of the configuration."""


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, every option of ``serve`` and ``--dry-run``; absent options are None."""
    add_settings(parser)
    text = "Check everything and show the plan; start nothing"
    parser.add_argument("--dry-run", action="store_true", help=text)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and every option of ``serve``, grouped by section; absent options are None."""
    text = "Folder or hub id of a checkpoint (default: the bundled one)"
    parser.add_argument("model", nargs="?", metavar="MODEL", help=text)
    text = "YAML file with values of these options, which flags and variables override"
    parser.add_argument("--config", metavar="FILE", help=text)
    flags = {option.field: option.flag for option in OPTIONS}
    here = [option for option in OPTIONS if not option.is_secret]  # main adds the secret ones
    for name, options in itertools.groupby(here, lambda option: option.section):
        text = (_SECTIONS[name].__doc__ or "").split("\n")[0]
        group = parser.add_argument_group(name or "start", text)
        for option in options:
            _add(group, option, help_text(option, flags))


def _add(group: argparse._ArgumentGroup, option: ServeOption, text: str) -> None:
    if not option.is_switch:
        bare: dict[str, Any] = {}
        if option.bare:
            bare = {"nargs": "?", "const": option.kind(option.bare)}
        choices, metavar = option.choices or None, option.metavar
        group.add_argument(
            option.flag, type=option.parse, choices=choices, metavar=metavar, help=text, **bare
        )
    elif option.default:
        action = argparse.BooleanOptionalAction
        group.add_argument(option.flag, action=action, default=None, help=text)
    else:
        group.add_argument(option.flag, action="store_const", const=True, help=text)


def add_missing_values(words: Sequence[str]) -> list[str]:
    """Add the omitted values of flags: ``--deterministic M`` -> ``--deterministic=on M``.

    Otherwise argparse would take any following word as the value. Also joins the values of
    ``--lora-modules a=x b=y``, because argparse would take only the first.
    """
    words = _join_modules(words)
    flags = {option.flag: option for option in OPTIONS if option.bare}
    return [
        f"{word}={flags[word].bare}"
        if word in flags and not flags[word].is_value(following)
        else word
        for word, following in zip(words, [*words, ""][1:], strict=True)
    ]


def _join_modules(words: Sequence[str]) -> list[str]:
    """Join values: ``--lora-modules a=x b=y MODEL`` -> ``--lora-modules a=x,b=y MODEL``."""
    found: list[str] = []
    is_open = False
    for word in words:
        is_module = is_open and "=" in word and not word.startswith("-")
        if is_module and found[-1] != _MODULES:
            found[-1] += f",{word}"
        else:
            found.append(word)
        is_open = is_module or word.partition("=")[0] == _MODULES
    return found


@dataclass(frozen=True, slots=True)
class Setting:
    """The value of an option, and its origin."""

    value: Any
    origin: str
    """Name of the flag, variable or file that set the value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenModel:
    """A model to serve with the options that hold for it."""

    model: Setting
    """Folder or hub id of the checkpoint; value None: the bundled checkpoint."""
    settings: Mapping[ServeOption, Setting]
    """The options that the user has given, with their values."""
    values: dict[str, Any]
    """Values of the given options by ``ServeOption.target``, with API keys as hashes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenOptions:
    """Values that the user has given for a start, by flags, variables or the file."""

    settings: Mapping[ServeOption, Setting]
    """The options that the user has given for all models, with their values."""
    values: dict[str, Any]
    """Values of these options by ``ServeOption.target``, with API keys as hashes."""
    models: tuple[GivenModel, ...]
    """The models to serve, at least one; the first is the default of requests without a model."""


def read_given_options(args: argparse.Namespace, environment: Mapping[str, str]) -> GivenOptions:
    """Read all option values that the user has given. Raises ``CommandError`` (usage)."""
    file = read_config_file(args.config, OPTIONS)
    found: dict[ServeOption, Setting] = {}
    for option in OPTIONS:
        if (value := getattr(args, option.dest)) is not None:
            found[option] = Setting(value, option.flag)
        elif environment.get(option.variable):
            value = _parse(option, environment[option.variable], option.variable)
            found[option] = Setting(value, option.variable)
        elif option.dest in file.values:
            value = _parse(option, file.values[option.dest], f"{option.key} in {args.config}")
            found[option] = Setting(value, args.config)
    values = {option.target: setting.value for option, setting in found.items()}
    values |= collect_keys(values, environment)
    model = _given_model(args, environment, file)
    return GivenOptions(
        settings=found, values=values, models=_given_models(file, model, found, values)
    )


def _given_model(
    args: argparse.Namespace, environment: Mapping[str, str], file: ConfigFile
) -> Setting:
    """Return the one model of the argument, variable or file. Raises ``CommandError`` (usage)."""
    models = (
        Setting(args.model, "MODEL"),
        Setting(environment.get("EXPERTMESH_MODEL"), "EXPERTMESH_MODEL"),
        Setting(file.model, args.config),
    )
    model = next((m for m in models if m.value), Setting(None, "default: the bundled checkpoint"))
    if file.models and model.value:
        message = f"{model.origin} ({model.value}) and models in {args.config} exclude each other"
        raise CommandError(ExitCode.USAGE, message)
    return model


def _given_models(
    file: ConfigFile,
    model: Setting,
    settings: Mapping[ServeOption, Setting],
    values: Mapping[str, Any],
) -> tuple[GivenModel, ...]:
    """Return the models with their options: the list in the file, or else the one model.

    An option of an entry overrides flags and variables, which hold for all models.
    """
    if not file.models:
        return (GivenModel(model=model, settings=settings, values=dict(values)),)
    given = []
    for place, texts in enumerate(file.models):
        where = file.origin_in(place)
        own = {
            option: Setting(_parse(option, texts[option.dest], f"{option.key} in {where}"), where)
            for option in OPTIONS
            if option.dest in texts
        }
        own_values = {option.target: setting.value for option, setting in own.items()}
        given.append(
            GivenModel(
                model=Setting(texts["model"], where),
                settings={**settings, **own},
                values={**values, **own_values},
            )
        )
    return tuple(given)


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Return one line of text for each ``EXPERTMESH_*`` variable that no command reads."""
    known = {*_VARIABLES, *_KEY_VARIABLES.values(), *(option.variable for option in OPTIONS)}
    return [
        f"{name} is set, but is not a variable of expertmesh{suggestion(name, known)}"
        for name in sorted(environment)
        if name.startswith(_PREFIX) and name not in known and not _KUBERNETES_VARIABLE.search(name)
    ]


def with_typed_names(message: str, args: argparse.Namespace, environment: Mapping[str, str]) -> str:
    """Replace field names in an error message with the names that the user has given.

    max_num_seqs (0) must be above 0 -> --max-num-seqs (0) must be above 0
    """
    if not hasattr(args, "config"):  # a command without the options of serve
        return with_flags(message, args)
    try:
        in_file = read_config_file(args.config, OPTIONS).values
    except CommandError:
        in_file = {}

    def origin(match: re.Match[str]) -> str:
        option = fields[match[0]]
        if getattr(args, option.dest, None) is None:
            if environment.get(option.variable):
                return option.variable
            if option.dest in in_file:
                return f"{option.key} in {args.config}"
        return option.flag

    fields = {option.field: option for option in OPTIONS}
    words = "|".join(map(re.escape, sorted(fields, key=len, reverse=True)))
    first = re.compile(rf"^(?:{words})(?= \()")
    others = re.compile(rf"(?<![\w/.-])(?:{words})(?![\w/.-])")
    text = others.sub(
        lambda match: origin(match) if "_" in match[0] else match[0], first.sub(origin, message)
    )
    return with_flags(text, args)


def collect_keys(
    values: Mapping[str, Any], environment: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Hash the API keys in ``values`` and in environment variables; return hashes by target.

    ``EXPERTMESH_API_KEYS`` and ``EXPERTMESH_ADMIN_KEYS`` hold keys separated by commas.
    """
    found = {}
    for target, variable in _KEY_VARIABLES.items():
        more = (key.strip() for key in environment.get(variable, "").split(","))
        keys = [key for key in (values.get(target, ""), *more) if key]
        if keys:
            found[target] = tuple(map(hash_key, dict.fromkeys(keys)))
    return found


def without_keys(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without API keys, for processes that do not need the keys."""
    names = {f"EXPERTMESH_{kind}_KEY{s}" for kind in ("API", "ADMIN") for s in ("", "S")}
    return {name: value for name, value in environment.items() if name not in names}


def _parse(option: ServeOption, text: str, origin: str) -> Any:
    """Parse an option's value from a variable or the file, which ``origin`` names in errors."""
    try:
        value = option.kind(text)
    except ValueError as err:
        raise CommandError(ExitCode.USAGE, f"{origin} ({text}) {option.rule}") from err
    if option.choices and value not in option.choices:
        raise CommandError(ExitCode.USAGE, f"{origin} ({text}) {option.rule}")
    return value


def read_template(text: str) -> str:
    """Return a chat template: the content of the file ``text``, or ``text`` itself."""
    from gateway.text.chat_template import ChatTemplate  # imports Jinja, which few commands need

    source = text
    if "{" not in text and "\n" not in text:
        try:
            source = Path(text).read_text()
        except (OSError, UnicodeDecodeError) as err:
            message = f"--chat-template ({text}) cannot be read: {err}"
            raise CommandError(ExitCode.USAGE, message) from err
    try:
        ChatTemplate(source)
    except CheckpointError as err:
        raise CommandError(ExitCode.USAGE, f"--chat-template: {err}") from err
    return source
