"""Loads the best library of kernels that this machine runs, or says why there is none."""

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
"""Environment variable that names the best instruction set to use, ``avx2`` for example."""
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
    "half_run": (_INT, (_POINTER, _POINTER, _POINTER, _POINTER, _INT)),
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
"""Result and arguments of the functions in ``c/``. Calls release Python's lock."""


class InstructionsError(ValueError):
    """``MAX_VARIABLE`` names no instruction set."""


@dataclass(frozen=True, slots=True)
class Library:
    """A loaded library."""

    name: str
    """Its instruction set."""
    path: Path
    functions: ctypes.CDLL


@dataclass(frozen=True, slots=True)
class LibraryChoice:
    """The kernels of this machine."""

    library: Library | None
    """None: torch computes."""
    reason: str
    """Why not a better one, for people; empty where this is the best."""

    @property
    def words(self) -> str:
        """For logs: ``native avx512 (no library for avx512_bf16: ..)``, ``torch (..)``."""
        name = f"native {self.library.name}" if self.library else "torch"
        return f"{name} ({self.reason})" if self.reason else name


def find_library(
    *,
    folder: Path | None = None,
    environ: Mapping[str, str] = os.environ,
    cpu_info: Path = CPU_INFO,
) -> LibraryChoice:
    """The best library that this processor runs, built first where that is needed.

    An instruction set whose library cannot be made gives way to the next one. Raises
    ``InstructionsError``.
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
    """Whether ``find_library`` has nothing to build."""
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
    """One library: that of the package, else that of the cache, which is built where it is missing
    or broken.

    ``folder`` is ``cache_folder`` by default. Raises ``BuildError`` and ``OSError``.
    """
    try:
        return _load(wanted.name, _shipped_path(wanted, shipped))
    except OSError as err:
        logger.debug("the package brings no kernels for %s: %s", wanted.name, err)
    folder = folder or cache_folder(environ)
    path = build(wanted, folder, environ)
    try:
        return _load(wanted.name, path)
    except OSError:
        path.unlink(missing_ok=True)
    return _load(wanted.name, build(wanted, folder, environ))


def _shipped_path(wanted: InstructionSet, shipped: Path) -> Path:
    """The package's library. ``$CC`` names the compiler of what is built here, and changes nothing
    about it."""
    return library_path(wanted, shipped, {})


def runnable(
    cpu_info: Path = CPU_INFO, environ: Mapping[str, str] = os.environ
) -> list[InstructionSet]:
    """The instruction sets of this processor, best first, up to that of ``MAX_VARIABLE``.

    Raises ``InstructionsError`` where that names none.

    On Intel's processors a ``vdpbf16ps`` of 32 products takes two cycles, in which fused sums of
    float32 make 64: one thread of an Emerald Rapids makes 44 and 76 products a nanosecond with 8
    rows and more, and reads as many bytes with one.
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
    """All instruction sets up to that of ``MAX_VARIABLE``, best first."""
    best, names = environ.get(MAX_VARIABLE), [known.name for known in INSTRUCTION_SETS]
    if not best:
        return INSTRUCTION_SETS
    if best not in names:
        raise InstructionsError(f"{MAX_VARIABLE} {best!r} must be one of {', '.join(names)}")
    return INSTRUCTION_SETS[names.index(best) :]


def _load(name: str, path: Path) -> Library:
    """Raises ``OSError`` for a file that is no library of these sources."""
    functions = ctypes.CDLL(str(path))
    for function, (result, arguments) in _SIGNATURES.items():
        try:
            loaded = getattr(functions, function)
        except AttributeError as err:
            raise OSError(f"{path} has no {function}") from err
        loaded.restype, loaded.argtypes = result, tuple(arguments)
    return Library(name, path, functions)
