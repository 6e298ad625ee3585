"""ctypes layouts of the structs in ``c/``, parsed from the C sources."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar

from workers.native.build import SOURCES

Fields = TypeVar("Fields", bound=ctypes.Structure)

_SCALARS: dict[str, Any] = {
    "int64_t": ctypes.c_int64,
    "int32_t": ctypes.c_int32,
    "uint8_t": ctypes.c_uint8,
    "double": ctypes.c_double,
    "float": ctypes.c_float,
}
_DECLARATION = re.compile(r"(?:const )?((?:struct )?\w+) ([^;]+);")
_DECLARATOR = re.compile(r"([* ]|const )*(\w+)(?:\[(\w+)\])?")


def c_struct(file: str, name: str, **types: Any) -> Callable[[type[Fields]], type[Fields]]:
    """Return a class decorator that sets ``_fields_`` to the fields of C ``struct name`` in
    ``c/file``.

    ``types``: ctypes of fields that are structs, and of pointers other than ``c_void_p``.
    """

    def with_fields(kind: type[Fields]) -> type[Fields]:
        kind._fields_ = list(_fields_of(_source(file), name, types))
        return kind

    return with_fields


@cache
def _source(file: str) -> str:
    """Return the text of a C file without comments, with single spaces between words."""
    return " ".join(re.sub(r"//.*", "", (SOURCES / file).read_text()).split())


def _fields_of(source: str, name: str, types: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield name and ctype of each field of a C struct. Raises ``LookupError`` if a type is
    unknown."""
    body = re.search(rf"struct {name} {{ ([^}}]*)}};", source)
    if body is None:
        raise LookupError(f"there is no struct {name}")
    for declaration in _DECLARATION.finditer(body[1]):
        plain, declarators = declaration.groups()
        for declarator in declarators.split(","):
            found = _DECLARATOR.fullmatch(declarator.strip())
            if found is None:
                raise LookupError(f"struct {name}: cannot parse {declarator}")
            field, count = found[2], found[3]
            is_pointer = "*" in declarator
            kind = types.get(field) or (ctypes.c_void_p if is_pointer else _SCALARS.get(plain))
            if kind is None:
                raise LookupError(f"struct {name}: {plain} {field} has no type")
            yield field, kind if count is None else kind * _constant(source, count)


def _constant(source: str, name: str) -> int:
    """Return the value of a C array size: a number, or the name of an enum constant."""
    if name.isdigit():
        return int(name)
    found = re.search(rf"\b{name} = (\d+)", source)
    if found is None:
        raise LookupError(f"{name} has no value")
    return int(found[1])
