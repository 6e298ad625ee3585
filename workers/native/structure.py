"""Fields of C structures, written by type."""

from __future__ import annotations

import ctypes
from typing import Any

_TYPES = {
    "int32": ctypes.c_int32,
    "int64": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "pointer": ctypes.c_void_p,
}


def fields(*parts: str | tuple[str, Any]) -> list[tuple[str, Any]]:
    """``_fields_`` of a ``ctypes.Structure``: neighbours of one type, or a field of any type.

    ``"int64: rows width"``, ``("form", FormFields)``.
    """
    found: list[tuple[str, Any]] = []
    for part in parts:
        if isinstance(part, tuple):
            found.append(part)
        else:
            kind, _, names = part.partition(": ")
            found += [(name, _TYPES[kind]) for name in names.split()]
    return found
