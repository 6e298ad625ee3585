"""``--config FILE``: the options of ``serve`` and ``up`` in YAML, by the names of their flags.

model: /models/OLMoE-1B-7B
num-expert-workers: 4
kv-cache-bytes: 8G
enable-eplb: true
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from cluster.cli.exit_codes import CommandError, ExitCode

MODEL = "model"
"""Key of what is the only argument on the command line."""


def read_config_file(path: str, known: Collection[str]) -> dict[str, str]:
    """Option texts by name, with underscores; ``known`` are the names there are, and ``model``.

    Raises ``CommandError`` (usage) for a file that cannot be read, or that sets anything else.
    """
    import yaml

    try:
        document = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        raise _refusal(path, f"cannot be read: {err}") from err
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise _refusal(path, "must hold names of options with their values")
    return dict(_entry(path, key, value, known) for key, value in document.items())


def _entry(path: str, key: object, value: Any, known: Collection[str]) -> tuple[str, str]:
    name = str(key).replace("-", "_")
    if name not in known and name != MODEL:
        raise _refusal(path, f"{key} is no option of serve")
    if not isinstance(value, str | int | float):  # a switch is an int too
        raise _refusal(path, f"{key} must have one value")
    return name, str(value)


def _refusal(path: str, rule: str) -> CommandError:
    return CommandError(ExitCode.USAGE, f"--config ({path}): {rule}")
