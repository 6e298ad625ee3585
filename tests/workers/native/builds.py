"""The builds of the kernels that this processor runs."""

from __future__ import annotations

from functools import cache

from workers.native.library import Library, load_library, runnable
from workers.native.team import Team

NAMES = [wanted.name for wanted in runnable()]
"""Instruction sets, best first; tests are parametrised with them."""


@cache
def library(name: str) -> Library:
    """The library of an instruction set, from the user's cache or built there."""
    return load_library(next(wanted for wanted in runnable() if wanted.name == name))


@cache
def team(name: str, count: int = 1) -> Team:
    """A team of so many threads."""
    return Team(library(name), count)
