"""Builds of the kernels: compilers that fail, several builders, stale and broken files."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from workers.native.build import (
    INSTRUCTION_SETS,
    SOURCES,
    BuildError,
    InstructionSet,
    build,
    cache_folder,
    compilers,
    library_path,
)
from workers.native.library import (
    MAX_VARIABLE,
    InstructionsError,
    find_library,
    is_built,
    load_library,
    runnable,
)

AVX2 = INSTRUCTION_SETS[-1]
ENVIRON = {"PATH": "/usr/bin:/bin"}
"""Without ``$CC``."""


def script(folder: Path, name: str, body: str) -> Path:
    """A compiler written in shell; ``$out`` is the file it has to write."""
    path = folder / name
    find_out = 'while [ "$1" != -o ]; do shift; done; out=$2'
    path.write_text(f"#!/bin/sh\nall=$*\n{find_out}\n{body}\n")
    path.chmod(0o755)
    return path


def cpu_info(folder: Path, wanted: InstructionSet) -> Path:
    """A ``/proc/cpuinfo`` of a processor with these instructions."""
    path = folder / "cpuinfo"
    path.write_text(f"processor\t: 0\nflags\t\t: fpu {' '.join(wanted.cpu_flags)}\n\n" * 2)
    return path


@pytest.mark.parametrize("wanted", INSTRUCTION_SETS, ids=[i.name for i in INSTRUCTION_SETS])
def test_a_processor_runs_its_instructions_and_lesser_ones(
    wanted: InstructionSet, tmp_path: Path
) -> None:
    found = runnable(cpu_info(tmp_path, wanted), {})
    assert found == list(INSTRUCTION_SETS[INSTRUCTION_SETS.index(wanted) :])


def test_float32_sums_come_before_bfloat16_products_on_intel(tmp_path: Path) -> None:
    path = cpu_info(tmp_path, INSTRUCTION_SETS[0])
    path.write_text(f"vendor_id\t: GenuineIntel\n{path.read_text()}")
    assert [wanted.name for wanted in runnable(path, {})] == ["avx512", "avx512_bf16", "avx2"]
    path = cpu_info(tmp_path, AVX2)
    path.write_text(f"vendor_id\t: GenuineIntel\n{path.read_text()}")
    assert runnable(path, {}) == [AVX2]


@pytest.mark.parametrize("best", INSTRUCTION_SETS, ids=[i.name for i in INSTRUCTION_SETS])
@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel"])
def test_a_variable_names_the_best_instructions(
    best: InstructionSet, vendor: str, tmp_path: Path
) -> None:
    path = cpu_info(tmp_path, INSTRUCTION_SETS[0])
    path.write_text(f"vendor_id\t: {vendor}\n{path.read_text()}")
    allowed = set(INSTRUCTION_SETS[INSTRUCTION_SETS.index(best) :])
    names = [wanted.name for wanted in runnable(path, {}) if wanted in allowed]
    environ = {MAX_VARIABLE: best.name}
    assert [wanted.name for wanted in runnable(path, environ)] == names
    found = find_library(environ={**os.environ, **environ})
    assert found.library is None or found.library.name == runnable(environ=environ)[0].name
    lesser = cpu_info(tmp_path, AVX2)
    assert runnable(lesser, environ) == [AVX2], "it gives a processor no instructions"


def test_a_variable_with_unknown_instructions_is_refused() -> None:
    rule = "EXPERTMESH_MAX_INSTRUCTIONS 'avx9' must be one of avx512_bf16, avx512, avx2"
    with pytest.raises(InstructionsError, match=rule):
        find_library(environ={MAX_VARIABLE: "avx9"})


def test_an_old_processor_runs_none(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("flags : fpu sse2\n")
    found = find_library(folder=tmp_path, cpu_info=path)
    assert found.library is None
    assert found.description == "torch (no AVX2: kernels are for x86-64 with AVX2 on Linux)"


def test_without_a_compiler_the_reason_is_said(tmp_path: Path) -> None:
    environ = {"CC": str(tmp_path / "none")}
    found = find_library(folder=tmp_path, environ=environ, cpu_info=cpu_info(tmp_path, AVX2))
    assert found.library is None
    assert found.reason.startswith("no library for avx2: ")
    assert "No such file" in found.reason
    with pytest.raises(BuildError, match="there is no C compiler"):
        build(AVX2, tmp_path / "cache", ENVIRON, commands=[])
    assert not (tmp_path / "cache").exists()


def test_only_the_chosen_compiler_is_tried() -> None:
    assert compilers({"CC": "gcc -m64", "PATH": "/usr/bin"}) == [("gcc", "-m64")]
    names = [Path(command[0]).name for command in compilers(ENVIRON)]
    assert (
        names[: len(names) - 1]
        == [n for n in ("cc", "gcc", "clang") if n in names][: len(names) - 1]
    )


def test_a_broken_compiler_gives_way_to_the_next(tmp_path: Path) -> None:
    broken = script(tmp_path, "broken", "echo internal error >&2; exit 4")
    works = script(tmp_path, "works", "echo library >$out")
    commands = [(str(broken),), (str(works),)]
    assert build(AVX2, tmp_path / "cache", ENVIRON, commands).read_text() == "library\n"
    with pytest.raises(BuildError, match="broken: internal error"):
        build(AVX2, tmp_path / "other", ENVIRON, commands[:1])
    assert list((tmp_path / "other").iterdir()) == []


def test_an_instruction_set_that_does_not_compile_gives_way_to_the_next(tmp_path: Path) -> None:
    real = load_library(AVX2)
    old = script(
        tmp_path,
        "old",
        f"case $all in *avx512bf16*) echo unknown option >&2; exit 1;; esac; cp {real.path} $out",
    )
    found = find_library(
        folder=tmp_path / "cache",
        environ={**ENVIRON, "CC": str(old)},
        cpu_info=cpu_info(tmp_path, INSTRUCTION_SETS[0]),
    )
    assert found.library is not None
    assert found.library.name == "avx512"
    assert "no library for avx512_bf16" in found.reason
    assert "unknown option" in found.reason


def test_of_builders_at_the_same_time_one_compiles(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    slow = script(
        tmp_path, "slow", f"echo run >>{runs}; echo one >$out; sleep 0.2; echo two >>$out"
    )
    cache = tmp_path / "cache"

    def make(_: int) -> str:
        return build(AVX2, cache, ENVIRON, [(str(slow),)]).read_text()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(make, range(4))) == ["one\ntwo\n"] * 4
    assert list(cache.iterdir()) == [library_path(AVX2, cache, ENVIRON)]
    assert runs.read_text() == "run\n"


def test_a_library_is_built_once(tmp_path: Path) -> None:
    counting = script(tmp_path, "counting", f"echo run >>{tmp_path}/runs; echo library >$out")
    for _ in range(2):
        build(AVX2, tmp_path / "cache", ENVIRON, [(str(counting),)])
    assert (tmp_path / "runs").read_text() == "run\n"


def test_changed_sources_flags_and_compiler_make_another_library(
    tmp_path: Path,
) -> None:
    first = library_path(AVX2, tmp_path, ENVIRON)
    assert library_path(AVX2, tmp_path, {**ENVIRON, "CC": "clang"}) != first
    assert library_path(INSTRUCTION_SETS[0], tmp_path, ENVIRON) != first
    copied = tmp_path / "c"
    shutil.copytree(SOURCES, copied)
    assert library_path(AVX2, tmp_path, ENVIRON, copied) == first
    with (copied / "team.c").open("a") as source:
        source.write("// changed\n")
    assert library_path(AVX2, tmp_path, ENVIRON, copied) != first


def test_a_broken_file_is_built_again(tmp_path: Path) -> None:
    real = load_library(AVX2)
    copying = script(tmp_path, "copying", f"cp {real.path} $out")
    environ = {**ENVIRON, "CC": str(copying)}
    broken = library_path(AVX2, tmp_path, environ)
    broken.write_bytes(b"\x7fELF, cut off")
    assert load_library(AVX2, tmp_path, environ).path == broken
    assert broken.read_bytes() == real.path.read_bytes()


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/expertmesh/kernels")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder({}) == Path("/home/someone/.cache/expertmesh/kernels")


def test_the_library_of_the_package_is_taken_before_that_of_the_cache(tmp_path: Path) -> None:
    real = load_library(AVX2)
    shipped, cache = tmp_path / "shipped", tmp_path / "cache"
    shipped.mkdir()
    path = library_path(AVX2, shipped, ENVIRON)
    shutil.copy(real.path, path)
    for environ in (ENVIRON, {**ENVIRON, "CC": "a compiler for what is built here"}):
        assert load_library(AVX2, cache, environ, shipped).path == path
        own_cache = {**environ, "XDG_CACHE_HOME": str(cache)}
        assert is_built(own_cache, cpu_info(tmp_path, AVX2), shipped)
    assert not cache.exists()


def test_a_package_whose_library_does_not_load_is_left_as_it_is(tmp_path: Path) -> None:
    """That of a newer libc, for example: the host builds its own."""
    real = load_library(AVX2)
    copying = script(tmp_path, "copying", f"cp {real.path} $out")
    environ = {**ENVIRON, "CC": str(copying)}
    shipped, cache = tmp_path / "shipped", tmp_path / "cache"
    shipped.mkdir()
    foreign = library_path(AVX2, shipped, ENVIRON)
    foreign.write_bytes(b"\x7fELF of another machine")
    assert load_library(AVX2, cache, environ, shipped).path.parent == cache
    assert foreign.read_bytes() == b"\x7fELF of another machine"


def test_what_is_not_built_yet_is_known_before(tmp_path: Path) -> None:
    environ = {**ENVIRON, "XDG_CACHE_HOME": str(tmp_path)}
    cpu = cpu_info(tmp_path, AVX2)
    assert not is_built(environ, cpu, tmp_path)
    library_path(AVX2, tmp_path, environ).touch()
    assert is_built(environ, cpu, tmp_path)


@pytest.mark.parametrize(("system", "machine"), [("linux", "aarch64"), ("darwin", "x86_64")])
def test_other_processors_and_systems_are_named(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert is_built()
    words = f"torch ({machine} on {system}: kernels are for x86-64 with AVX2 on Linux)"
    assert find_library().description == words
