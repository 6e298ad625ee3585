"""What the sections of the configuration check their values with."""

from __future__ import annotations

from typing import Any, get_args

from cluster.errors import ConfigError


def check(ok: bool, name: str, value: object, rule: str) -> None:
    """Raise ``ConfigError`` unless ``ok``."""
    if not ok:
        raise ConfigError(name, value, rule)


def check_choice(name: str, value: str | int, kind: Any) -> None:
    """Raise ``ConfigError`` unless ``value`` is one of the ``Literal`` type ``kind``."""
    choices = get_args(kind)
    check(value in choices, name, value, f"must be one of {', '.join(map(str, choices))}")
