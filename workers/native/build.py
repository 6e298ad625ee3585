"""Builds the kernels' libraries, one for each instruction set, and keeps them in a cache.

A wheel contains libraries (see ``setup.py``); missing ones are built on first use. The compiler is
``$CC`` if set, otherwise ``cc``, ``gcc`` or ``clang``, otherwise the C compiler of the ``ziglang``
package if it is installed. The name of a library contains a digest of everything that determines
its contents, so an old library is never used after a change of the sources. If several processes
need the same library, one builds it into a temporary file, which it renames, and the others wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "c"
SHIPPED = Path(__file__).parent / "lib"
"""Folder of the kernel libraries in an installed package; a checkout of the sources has none."""
BUILD_LIMIT_S = 600.0
"""Time limit of one compiler run in seconds. A run takes about a minute, longer on a busy host."""
_FLAGS = (
    "-std=c11",
    "-O3",
    "-shared",
    "-fPIC",
    "-pthread",
    "-ffp-contract=off",  # fuse a product and a sum only where the source does so explicitly
    "-fvisibility=default",
    "-Wall",
    "-Wextra",
)
ZIG_ARGUMENTS = ("cc", "-target", "x86_64-linux-gnu.2.17")
"""Arguments of zig's C compiler. The explicit target replaces zig's default, the processor and libc
of the host. Libraries for glibc 2.17 also run with later versions."""
_ERROR_CHARACTERS = 400


class BuildError(Exception):
    """No compiler could build the kernel library. The message has the error of each compiler."""


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """An instruction set of x86-64 for which a kernel library is built."""

    name: str
    cpu_flags: frozenset[str]
    """Flags in ``/proc/cpuinfo`` that a processor with this instruction set has."""
    compiler_flags: tuple[str, ...]
    """Compiler flags; never ``-march=native``, as a library may be built for another machine."""


_AVX2 = InstructionSet("avx2", frozenset({"avx2", "fma", "f16c"}), ("-mavx2", "-mfma", "-mf16c"))
_AVX512 = InstructionSet(
    "avx512",
    _AVX2.cpu_flags | {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    (*_AVX2.compiler_flags, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
)
_AVX512_BF16 = InstructionSet(
    "avx512_bf16",
    _AVX512.cpu_flags | {"avx512_bf16", "avx512vbmi"},
    (*_AVX512.compiler_flags, "-mavx512bf16", "-mavx512vbmi"),
)
INSTRUCTION_SETS = (_AVX512_BF16, _AVX512, _AVX2)
"""All instruction sets for which kernel libraries can be built, best first."""


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder that caches kernel libraries: ``$XDG_CACHE_HOME/expertmesh/kernels`` or in
    ``~/.cache``."""
    base = environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "expertmesh" / "kernels"


def has_kernels() -> bool:
    """Whether CPU kernels exist for this platform (x86-64 Linux)."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def compilers(environ: Mapping[str, str] = os.environ) -> list[tuple[str, ...]]:
    """Return the compiler commands to try, in order. If ``$CC`` is set, it is the only one."""
    if environ.get("CC"):
        return [tuple(shlex.split(environ["CC"]))]
    path = environ.get("PATH")
    found = [shutil.which(name, path=path) for name in ("cc", "gcc", "clang")]
    return [*((command,) for command in found if command), *zig_compilers()]


def zig_compilers() -> list[tuple[str, ...]]:
    """Return the compiler command of the ``ziglang`` package in a list; empty if it is not
    installed."""
    if importlib.util.find_spec("ziglang") is None:
        return []
    return [(sys.executable, "-m", "ziglang", *ZIG_ARGUMENTS)]


def library_path(
    wanted: InstructionSet,
    folder: Path,
    environ: Mapping[str, str] = os.environ,
    sources: Path = SOURCES,
) -> Path:
    """Return the path of an instruction set's kernel library. The file name has a digest of the
    sources, the flags and ``$CC``."""
    digest = hashlib.sha256()
    for part in (*_FLAGS, *wanted.compiler_flags, environ.get("CC", "")):
        digest.update(part.encode() + b"\0")
    for source in sorted(sources.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return folder / f"{wanted.name}-{digest.hexdigest()[:16]}.so"


def build(
    wanted: InstructionSet,
    folder: Path,
    environ: Mapping[str, str] = os.environ,
    commands: Iterable[tuple[str, ...]] | None = None,
    sources: Path = SOURCES,
) -> Path:
    """Return the kernel library of an instruction set, from the cache or built by a working
    compiler.

    ``commands``: compilers to try, by default ``compilers(environ)``. ``sources``: folder with the
    C files. Raises ``BuildError``, or ``OSError`` if ``folder`` cannot be written.
    """
    target = library_path(wanted, folder, environ, sources)
    if target.exists():
        return target
    found = list(compilers(environ) if commands is None else commands)
    if not found:
        raise BuildError("there is no C compiler")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _alone(folder):
        return target if target.exists() else _make(target, wanted, found, sources)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock the folder against builds by other processes, if its file system supports locks."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _make(
    target: Path, wanted: InstructionSet, commands: Iterable[tuple[str, ...]], sources: Path
) -> Path:
    logger.info("building the kernels for %s, which may take a minute", wanted.name)
    folder, errors = target.parent, []
    for command in commands:
        handle, name = tempfile.mkstemp(dir=folder, prefix=f".{wanted.name}-", suffix=".so")
        os.close(handle)
        try:
            error = _compile(command, wanted, Path(name), sources)
            if error is None:
                os.replace(name, target)
                return target
            errors.append(f"{shlex.join(command)}: {error}")
        finally:
            Path(name).unlink(missing_ok=True)
    raise BuildError("; ".join(errors))


def _compile(
    command: tuple[str, ...], wanted: InstructionSet, output: Path, sources: Path
) -> str | None:
    """Compile the kernels with one compiler; return its error text, or None on success."""
    files = [str(source) for source in sorted(sources.glob("*.c"))]
    line = [*command, *_FLAGS, *wanted.compiler_flags, "-o", str(output), *files]
    try:
        done = subprocess.run(
            line, capture_output=True, text=True, timeout=BUILD_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        return str(err)
    if done.returncode == 0:
        return None
    return (done.stderr or done.stdout).strip()[:_ERROR_CHARACTERS] or f"exit {done.returncode}"
