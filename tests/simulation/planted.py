"""A planted bug, and where it is looked for.

It is looked for in its first seeds, so many that it is found although other changes of the product
move the finds to other seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

FEW = 100
"""Seeds for a bug that at least one seed of ten finds: all of them miss it once in 40,000 times."""
MANY = 600
"""The same for one that one seed of 60 finds."""


@dataclass(frozen=True, slots=True)
class Bug:
    """A planted bug, and the faults that bring it to light."""

    plant: Callable[[], AbstractContextManager[object]]
    kinds: tuple[str, ...]
    num_seeds: int = FEW
    """Seeds from 0 on, of which one at least finds it."""
    features: tuple[str, ...] = ()
    """What its scenarios have."""
