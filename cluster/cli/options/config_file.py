"""Reads the file of ``--config``: values of options, and models with options of their own.

num-expert-workers: 2
models:
  - model: /models/OLMoE-1B-7B
    num-expert-workers: 4
  - model: /models/dots.llm1
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.cli.options.option import ServeOption
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.parser import suggestion

SHARED_SECTIONS = ("", "gateway", "observability")
"""Sections of options that hold for all models: of the start, the gateway, and traces and logs."""
MAX_MODELS = 64
_MODEL, _MODELS = "model", "models"


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigFile:
    """The texts in a file, by ``ServeOption.dest``, and by ``model``."""

    path: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    models: tuple[Mapping[str, str], ...] = ()
    """Texts of each entry of ``models``; empty without the list. An entry has at least a model."""

    @property
    def model(self) -> str | None:
        return self.values.get(_MODEL)

    def origin_in(self, place: int) -> str:
        """Return how messages name the entry at ``place`` of ``models``."""
        return f"{_MODELS}[{place}] in {self.path}"


def read_config_file(path: str | None, options: Collection[ServeOption]) -> ConfigFile:
    """Read a file; None: an empty one. Raises ``CommandError`` (usage) that names the entry."""
    if not path:
        return ConfigFile()
    import yaml

    try:
        document = yaml.safe_load(Path(path).read_text())
    except OSError as err:
        raise _refusal(path, f"cannot be read: {err.strerror}") from err
    except (ValueError, yaml.YAMLError) as err:  # a date that does not exist is a ValueError
        raise _refusal(path, f"cannot be read: {' '.join(str(err).split())}") from err
    if document is None:
        return ConfigFile(path=path)
    if not isinstance(document, dict):
        raise _refusal(path, "must hold names of options with their values")
    models = document.pop(_MODELS, None)
    values = _entries(path, "", document, options)
    if models is None:
        return ConfigFile(path=path, values=values)
    if _MODEL in values:
        raise _refusal(path, f"{_MODEL} and {_MODELS} exclude each other")
    entries = tuple(_models(path, models, options))
    return ConfigFile(path=path, values=values, models=entries)


def _models(
    path: str, models: object, options: Collection[ServeOption]
) -> Iterable[Mapping[str, str]]:
    if not isinstance(models, list) or not 1 <= len(models) <= MAX_MODELS:
        raise _refusal(path, f"{_MODELS} must be a list of 1 to {MAX_MODELS} models")
    own = [option for option in options if option.section not in SHARED_SECTIONS]
    for place, entry in enumerate(models):
        where = f"{_MODELS}[{place}]"
        if not isinstance(entry, dict) or not entry.get(_MODEL):
            raise _refusal(path, f"{where} must have a {_MODEL} and may have options of serve")
        shared = {o.dest for o in options if o.section in SHARED_SECTIONS}
        for key in entry:
            if str(key).replace("-", "_") in shared:
                raise _refusal(path, f"{where}: {key} holds for all models, outside the list")
        yield _entries(path, f"{where}: ", entry, own)


def _entries(
    path: str, where: str, found: Mapping[Any, Any], options: Collection[ServeOption]
) -> dict[str, str]:
    """Check names and shapes of values; return the texts by name with underscores."""
    known = {_MODEL, *(option.dest for option in options)}
    texts = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name not in known:
            meant = suggestion(name.replace("_", "-"), (option.key for option in options))
            raise _refusal(path, f"{where}{key} is not an option of serve{meant}")
        if not isinstance(value, str | int | float):  # a switch is an int too
            raise _refusal(path, f"{where}{key} must have one value")
        texts[name] = str(value)
    return texts


def _refusal(path: str, rule: str) -> CommandError:
    return CommandError(ExitCode.USAGE, f"--config ({path}): {rule}")
