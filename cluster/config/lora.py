"""Adapters: which are loaded at the start, and how many and how large they may be."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cluster.core.checks import check, check_each, is_at_least_1, is_not_negative

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
NAME_RULE = "must be 1 to 128 letters, digits or ._:/- and begin with a letter or a digit"
MAX_PATH = 1024
"""Most characters of a folder's path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSection:
    """Low-rank adapters (LoRA) of the model."""

    lora_modules: tuple[str, ...] = ()
    """Adapters to load at the start, several with commas or as words of their own."""
    max_loras: int = 8
    """Adapters that may be loaded at once; 0 loads none."""
    max_lora_rank: int = 64
    """Largest rank of an adapter."""

    def __post_init__(self) -> None:
        check_each(self, "max_loras", is_not_negative, "must not be negative")
        check_each(self, "max_lora_rank", is_at_least_1, "must be at least 1")
        for module in self.lora_modules:
            name, _, path = module.partition("=")
            rule = f"must be NAME=FOLDER; NAME {NAME_RULE}"
            check(is_name(name) and 0 < len(path) <= MAX_PATH, "lora_modules", module, rule)
        names = [name for name, _ in self.modules]
        rule = "must not name an adapter twice"
        check(len(set(names)) == len(names), "lora_modules", " ".join(names), rule)
        rule = f"must not exceed max_loras ({self.max_loras})"
        check(len(names) <= self.max_loras, "lora_modules", len(names), rule)

    @property
    def modules(self) -> tuple[tuple[str, str], ...]:
        """(name, folder) of the adapters to load at the start."""
        pairs = (module.partition("=") for module in self.lora_modules)
        return tuple((name, path) for name, _, path in pairs)


def is_name(name: str) -> bool:
    """Whether an adapter may have this name."""
    return _NAME.fullmatch(name) is not None
