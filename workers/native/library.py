"""Loads the best kernel library that this machine supports, or reports why there is none."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workers.native.build import (
    INSTRUCTION_SETS,
    SHIPPED,
    BuildError,
    InstructionSet,
    build,
    cache_folder,
    has_kernels,
    library_path,
)

logger = logging.getLogger(__name__)

CPU_INFO = Path("/proc/cpuinfo")
MAX_VARIABLE = "EXPERTMESH_MAX_INSTRUCTIONS"
"""Name of the environment variable that limits the instruction set of the CPU kernels, for example
to ``avx2``."""
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
_INT64 = ctypes.c_int64
_SIGNATURES: Mapping[str, tuple[type | None, Sequence[type]]] = {
    "team_new": (_POINTER, (_INT, _INT)),
    "team_free": (None, (_POINTER,)),
    "team_claim": (_INT, (_POINTER,)),
    "team_release": (None, (_POINTER,)),
    "experts_compute": (_INT, (_POINTER, _POINTER)),
    "layers_run": (
        _INT,
        (_POINTER, _POINTER, _POINTER, _INT64, ctypes.c_double, _POINTER),
    ),
    "linear_run": (_INT, (_POINTER, _POINTER, _POINTER, _LONG, _POINTER)),
    "sublayer_run": (_INT, (_POINTER, _POINTER, _POINTER, _POINTER, _INT)),
    "delta_net_run": (_INT, (_POINTER, _POINTER, _POINTER)),
    "norm_rows": (None, (_POINTER, _POINTER, _LONG, _LONG, ctypes.c_double, _INT, _POINTER)),
    "draw_rows": (
        _INT,
        (_POINTER, _POINTER, _INT, _LONG, _LONG, _INT, _POINTER, _POINTER),
    ),
    "exchange_slots": (
        _INT,
        (_POINTER, _LONG, _LONG, _POINTER, _LONG, _LONG, _POINTER, _INT, _POINTER),
    ),
    "exchange_dispatch": (_INT, (_POINTER,)),
    "exchange_gather": (_INT, (_POINTER,)),
    "exchange_memory": (_INT64, (_POINTER,)),
    "exchange_serve": (_INT, (_POINTER, _INT64, _POINTER)),
    "panels_pack": (_INT, (_POINTER, _POINTER, _POINTER, *(_LONG,) * 5, _INT)),
    "panels_unpack": (None, (_POINTER, _POINTER, *(_LONG,) * 5, _INT)),
    "rounding_groups": (_INT, (_POINTER, _POINTER, _LONG, _LONG, *(_POINTER,) * 3)),
    "quantized_to_halves": (None, (_POINTER, _LONG)),
    "quantized_from_halves": (None, (_POINTER, _LONG)),
}
"""Result and argument types of the C functions by name. A call releases Python's GIL."""


class InstructionsError(ValueError):
    """The environment variable ``EXPERTMESH_MAX_INSTRUCTIONS`` does not name an instruction set."""


@dataclass(frozen=True, slots=True)
class Library:
    """Kernel library for one instruction set, loaded into this process."""

    name: str
    """Name of the instruction set for which the library was built."""
    path: Path
    functions: ctypes.CDLL


@dataclass(frozen=True, slots=True)
class LibraryChoice:
    """The kernel library chosen for this machine."""

    library: Library | None
    """The loaded library, or None if torch computes instead of kernels."""
    reason: str
    """Reason why no better library is used, or none at all; ``""`` if the best one for this
    processor, up to ``MAX_VARIABLE``, is used."""

    @property
    def description(self) -> str:
        """Text for logs: ``native avx512 (no library for avx512_bf16: ..)`` or ``torch (..)``."""
        name = f"native {self.library.name}" if self.library else "torch"
        return f"{name} ({self.reason})" if self.reason else name


def find_library(
    *,
    folder: Path | None = None,
    environ: Mapping[str, str] = os.environ,
    cpu_info: Path = CPU_INFO,
) -> LibraryChoice:
    """Load the best kernel library that this processor supports, and build it if necessary.

    If the library for one instruction set cannot be built, the next one is tried. Raises
    ``InstructionsError`` if ``EXPERTMESH_MAX_INSTRUCTIONS`` is invalid.
    """
    reasons: list[str] = []
    for wanted in runnable(cpu_info, environ):
        try:
            return LibraryChoice(load_library(wanted, folder, environ), "; ".join(reasons))
        except (BuildError, OSError) as err:
            reasons.append(f"no library for {wanted.name}: {err}")
    machine = f"{platform.machine()} on {sys.platform}" if not has_kernels() else "no AVX2"
    return LibraryChoice(
        None, "; ".join(reasons) or f"{machine}: kernels are for x86-64 with AVX2 on Linux"
    )


def is_built(
    environ: Mapping[str, str] = os.environ, cpu_info: Path = CPU_INFO, shipped: Path = SHIPPED
) -> bool:
    """Whether ``find_library`` needs no build: the best kernel library exists, or this machine
    supports none."""
    return all(
        _shipped_path(wanted, shipped).exists()
        or library_path(wanted, cache_folder(environ), environ).exists()
        for wanted in runnable(cpu_info, environ)[:1]
    )


def load_library(
    wanted: InstructionSet,
    folder: Path | None = None,
    environ: Mapping[str, str] = os.environ,
    shipped: Path = SHIPPED,
) -> Library:
    """Load the kernel library of an instruction set; build it if it is missing or broken.

    The library of the package is tried first, then the one in ``folder`` (the cache, by default
    ``cache_folder``). Raises ``BuildError`` and ``OSError``.
    """
    try:
        return _load(wanted.name, _shipped_path(wanted, shipped))
    except OSError as err:
        logger.debug("the package has no kernels for %s: %s", wanted.name, err)
    folder = folder or cache_folder(environ)
    path = build(wanted, folder, environ)
    try:
        return _load(wanted.name, path)
    except OSError:
        path.unlink(missing_ok=True)
    return _load(wanted.name, build(wanted, folder, environ))


def _shipped_path(wanted: InstructionSet, shipped: Path) -> Path:
    """Return the path of the package's library, which does not depend on ``$CC``."""
    return library_path(wanted, shipped, {})


def runnable(
    cpu_info: Path = CPU_INFO, environ: Mapping[str, str] = os.environ
) -> list[InstructionSet]:
    """Return the instruction sets to try on this processor, best first.

    The environment variable ``MAX_VARIABLE`` may name one of them; better ones are then left out.
    Raises ``InstructionsError`` if the variable is invalid.

    On Intel processors, the set with bfloat16 products is second: a ``vdpbf16ps`` of 32 products
    takes two cycles, in which fused float32 operations compute 64. With 8 or more rows, a thread of
    an Emerald Rapids computes 44 products a nanosecond with ``vdpbf16ps`` and 76 with float32; with
    one row, both take the same time.
    """
    if not has_kernels():
        return []
    lines = (line.partition(":") for line in cpu_info.read_text().splitlines())
    words = {name.strip(): value.split() for name, _, value in lines}
    flags = set(words.get("flags", ()))
    found = [i for i in _allowed(environ) if i.cpu_flags <= flags]
    if words.get("vendor_id") == ["GenuineIntel"] and found[:1] == [INSTRUCTION_SETS[0]]:
        found[:2] = found[1], found[0]
    return found


def _allowed(environ: Mapping[str, str]) -> Sequence[InstructionSet]:
    """Return the instruction sets that ``MAX_VARIABLE`` permits, best first."""
    best, names = environ.get(MAX_VARIABLE), [known.name for known in INSTRUCTION_SETS]
    if not best:
        return INSTRUCTION_SETS
    if best not in names:
        raise InstructionsError(f"{MAX_VARIABLE} {best!r} must be one of {', '.join(names)}")
    return INSTRUCTION_SETS[names.index(best) :]


def _load(name: str, path: Path) -> Library:
    """Load a kernel library from a file. Raises ``OSError`` if the file cannot be loaded, or lacks
    a function because it was built from other sources."""
    functions = ctypes.CDLL(str(path))
    for function, (result, arguments) in _SIGNATURES.items():
        try:
            loaded = getattr(functions, function)
        except AttributeError as err:
            raise OSError(f"{path} has no {function}") from err
        loaded.restype, loaded.argtypes = result, tuple(arguments)
    return Library(name, path, functions)
