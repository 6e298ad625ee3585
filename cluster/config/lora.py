"""Configuration of LoRA adapters: which are loaded at start, and how many and how large."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath

from cluster.core.checks import check, check_each, is_at_least_1, is_not_negative

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
NAME_RULE = "must be 1 to 128 letters, digits or ._:/- and begin with a letter or a digit"
MAX_PATH = 1024
"""Maximum length of a folder's path in characters."""
MAX_TENANTS = 64
"""Maximum number of tenants (owners of API keys) to which an adapter may be restricted."""
MAX_TENANT = 128
"""Maximum length of a tenant's name in characters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraModule:
    """A LoRA adapter to load at the start."""

    name: str
    path: str
    tenants: tuple[str, ...] = ()
    """Names of the API keys that may use the adapter; if empty, every caller may use it."""

    @classmethod
    def parse(cls, text: str) -> LoraModule:
        """Parse ``NAME=FOLDER`` or ``NAME@KEY+KEY=FOLDER`` without checking the parts."""
        head, _, path = text.partition("=")
        name, mark, tenants = head.partition("@")
        return cls(name=name, path=path, tenants=tuple(tenants.split("+")) if mark else ())

    def __str__(self) -> str:
        """Return the text that ``parse`` accepts."""
        mark = f"@{'+'.join(self.tenants)}" if self.tenants else ""
        return f"{self.name}{mark}={self.path}"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSection:
    """Low-rank adapters (LoRA) of the model."""

    lora_modules: tuple[str, ...] = ()
    """LoRA adapters to load at start, separated by commas or spaces; NAME@KEY+KEY=FOLDER restricts
    an adapter to the API keys with these names."""
    lora_roots: tuple[str, ...] = ()
    """Folders from which adapters may be loaded while serving. The default is the parent folders of
    ``lora_modules``, and any folder if no API keys are configured."""
    max_loras: int = 8
    """Maximum number of adapters that are loaded at the same time; 0 disables adapters."""
    max_lora_rank: int = 64
    """Maximum rank of an adapter."""

    def __post_init__(self) -> None:
        check_each(self, "max_loras", is_not_negative, "must not be negative")
        check_each(self, "max_lora_rank", is_at_least_1, "must be at least 1")
        for text, module in zip(self.lora_modules, self.adapters, strict=True):
            rule = f"must be NAME=FOLDER or NAME@KEY+KEY=FOLDER; NAME {NAME_RULE}"
            is_module = is_valid_name(module.name) and 0 < len(module.path) <= MAX_PATH
            check(is_module and are_valid_tenants(module.tenants), "lora_modules", text, rule)
        names = [module.name for module in self.adapters]
        rule = "must not name an adapter twice"
        check(len(set(names)) == len(names), "lora_modules", " ".join(names), rule)
        rule = f"must not exceed max_loras ({self.max_loras})"
        check(len(names) <= self.max_loras, "lora_modules", len(names), rule)
        for root in self.lora_roots:
            rule = f"must be an absolute path of at most {MAX_PATH} characters"
            check(is_folder_path(root), "lora_roots", root, rule)

    @property
    def adapters(self) -> tuple[LoraModule, ...]:
        """LoRA adapters to load at the start."""
        return tuple(map(LoraModule.parse, self.lora_modules))

    @property
    def modules(self) -> tuple[tuple[str, str], ...]:
        """Name and folder of each LoRA adapter to load at the start."""
        return tuple((module.name, module.path) for module in self.adapters)

    @property
    def roots(self) -> tuple[str, ...]:
        """Folders from which LoRA adapters may be loaded while serving.

        These are ``lora_roots``, or by default the parent folders of the adapters to load at the
        start.
        """
        if self.lora_roots:
            return self.lora_roots
        parents = (PurePosixPath(path).parent for _, path in self.modules)
        return tuple(dict.fromkeys(str(p) for p in parents if len(p.parts) > 1))

    def allows_path(self, path: str) -> bool:
        """Return whether an adapter may be loaded from this path.

        Symbolic links are not resolved.
        """
        folder = PurePosixPath(path)
        is_plain = is_folder_path(path) and ".." not in folder.parts
        named = {path for _, path in self.modules}
        return is_plain and (path in named or any(map(folder.is_relative_to, self.roots)))


def are_valid_tenants(names: Collection[str]) -> bool:
    """Return whether ``names`` may be the tenants of a LoRA adapter."""
    is_each = all(0 < len(name) <= MAX_TENANT and name.isprintable() for name in names)
    return is_each and len(names) <= MAX_TENANTS


def is_folder_path(path: str) -> bool:
    """Return whether ``path`` is an absolute path of at most ``MAX_PATH`` characters."""
    return len(path) <= MAX_PATH and PurePosixPath(path).is_absolute() and "\0" not in path


def is_valid_name(name: str) -> bool:
    """Return whether a LoRA adapter may have this name."""
    return _NAME.fullmatch(name) is not None
