"""Metadata of configuration fields: the name of the command line option and its bare value."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

FLAG = "flag"
"""Metadata key for the name of a field's command-line option."""
BARE = "bare"
"""Metadata key for the value of a command-line option that is given without a value."""
INTERNAL: Mapping[str, str] = MappingProxyType({FLAG: ""})
"""Metadata of a configuration field that has no command-line option."""


def flag(name: str) -> Mapping[str, str]:
    """Return metadata of a field with an option called ``name``, which includes the dashes."""
    return MappingProxyType({FLAG: name})


def bare(value: str) -> Mapping[str, str]:
    """Return metadata of a field with an option that means ``value`` if given without a value."""
    return MappingProxyType({BARE: value})
