"""Layouts that Python reads from the sources, and those of the compiler."""

from __future__ import annotations

import ctypes
import re
import subprocess

import pytest

from workers.native import (
    attention_sublayer,
    delta_net,
    exchange,
    experts,
    frames,
    layers,
    matrix,
    quantized,
)
from workers.native.build import INSTRUCTION_SETS, SOURCES, compilers, has_kernels
from workers.native.structs import c_struct

MODULES = (attention_sublayer, delta_net, exchange, experts, frames, layers, matrix, quantized)
STRUCTS = [
    kind
    for module in MODULES
    for kind in vars(module).values()
    if isinstance(kind, type)
    and issubclass(kind, ctypes.Structure)
    and kind.__module__ == module.__name__
]


@pytest.mark.skipif(not has_kernels(), reason="kernels are for x86-64 on Linux")
def test_layouts_are_those_of_the_compiler() -> None:
    assert len(STRUCTS) == 21
    lines = ['#include "layers.c"', '#include "delta_net.h"', "#include <stddef.h>"]
    for kind in STRUCTS:
        found = re.match(r"C ``(struct \w+)``", kind.__doc__ or "")
        assert found is not None, kind
        lines.append(f'_Static_assert(sizeof({found[1]}) == {ctypes.sizeof(kind)}, "size");')
        for name, *_ in kind._fields_:
            field = getattr(kind, name)
            place = f"offsetof({found[1]}, {name}) == {field.offset}"
            size = f"sizeof((({found[1]} *)0)->{name}) == {field.size}"
            lines.append(f'_Static_assert({place} && {size}, "{kind.__name__}.{name}");')
    flags = (*INSTRUCTION_SETS[-1].compiler_flags, "-std=c11", "-fsyntax-only", f"-I{SOURCES}")
    command = [*compilers()[0], *flags, "-xc", "-"]
    done = subprocess.run(command, input="\n".join(lines), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "types", "reason"),
    [
        ("no_such", {}, "there is no struct no_such"),
        ("router", {}, "struct router: struct matrix matrix has no type"),
    ],
)
def test_what_is_not_understood_is_named(name: str, types: dict[str, type], reason: str) -> None:
    with pytest.raises(LookupError, match=reason):
        c_struct("attention_sublayer.h", name, **types)(type("Fields", (ctypes.Structure,), {}))
