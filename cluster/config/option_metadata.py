"""Metadata of configuration fields: whether a field has a command line option, and its name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

FLAG = "flag"
"""Key of the metadata."""
INTERNAL: Mapping[str, str] = MappingProxyType({FLAG: ""})
"""Metadata of a field without an option."""


def flag(name: str) -> Mapping[str, str]:
    """Metadata of a field whose option has another name; ``name`` has its dashes."""
    return MappingProxyType({FLAG: name})
