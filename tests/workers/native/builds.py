"""The builds of the kernels that this processor runs."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache

from workers.native.library import Library, load_library, runnable
from workers.native.thread_team import ThreadTeam

NAMES = [wanted.name for wanted in runnable()]
"""Instruction sets, best first; tests are parametrised with them."""
SANITIZER = "EXPERTMESH_TEST_SANITIZER"
"""Variable with which ``test_sanitizers.py`` has the compiler look for errors: ``thread``, say."""


@cache
def library(name: str) -> Library:
    """The library of an instruction set, from the user's cache or built there."""
    wanted = next(wanted for wanted in runnable() if wanted.name == name)
    if kinds := os.environ.get(SANITIZER):
        checks = (f"-fsanitize={kinds}", "-fno-sanitize-recover=all", "-g", "-O1")
        wanted = replace(wanted, compiler_flags=(*wanted.compiler_flags, *checks))
    return load_library(wanted)


@cache
def team(name: str, count: int = 1) -> ThreadTeam:
    """A team of so many threads."""
    return ThreadTeam(library(name), count)
