"""Metadata of configuration fields: the name of their command line option, and its bare form."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

FLAG = "flag"
"""Key of the name."""
BARE = "bare"
"""Key of the value of an option without a value."""
INTERNAL: Mapping[str, str] = MappingProxyType({FLAG: ""})
"""Metadata of a field without an option."""


def flag(name: str) -> Mapping[str, str]:
    """Metadata of a field whose option has another name; ``name`` has its dashes."""
    return MappingProxyType({FLAG: name})


def bare(value: str) -> Mapping[str, str]:
    """Metadata of a field whose option means ``value`` where none is given."""
    return MappingProxyType({BARE: value})
