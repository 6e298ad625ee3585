"""Metadata of configuration fields: the name of the command line option and its bare value."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

FLAG = "flag"
"""Metadata key of the option's name."""
BARE = "bare"
"""Metadata key of the value of an option that is given without a value."""
INTERNAL: Mapping[str, str] = MappingProxyType({FLAG: ""})
"""Metadata of a field without an option."""


def flag(name: str) -> Mapping[str, str]:
    """Metadata of a field whose option is called ``name``, which includes the dashes."""
    return MappingProxyType({FLAG: name})


def bare(value: str) -> Mapping[str, str]:
    """Metadata of a field whose option may be given without a value, which stands for ``value``."""
    return MappingProxyType({BARE: value})
