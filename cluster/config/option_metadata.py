"""What a field of the configuration says about its command line option, as field metadata."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

FLAG = "flag"
"""Key of the metadata."""
INTERNAL: Mapping[str, str] = MappingProxyType({FLAG: ""})
"""Of fields without an option."""


def flag(name: str) -> Mapping[str, str]:
    """Of fields whose option has another name, with its dashes."""
    return MappingProxyType({FLAG: name})
