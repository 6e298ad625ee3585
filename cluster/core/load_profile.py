"""Load profiles: the number of tokens that each logical expert computed, in memory and in files.

File format (``load --save``, ``plan --profile``):

    {"schema": 1, "model": "demo", "top_k": 8, "tokens": 1000,
     "banks": [{"bank": "mlp", "layer": 0, "counts": [130, 125, ...]}]}
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from operator import add
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from cluster.core.checks import check
from cluster.core.codec import from_plain, to_plain
from cluster.core.errors import ConfigError
from cluster.core.placement import FREE_SLOT, BankPlacement, BankShape

SCHEMA = 1
"""Version of the file format of load profiles."""


class BankLoad(msgspec.Struct, frozen=True, kw_only=True):
    """The load of one expert bank: how many tokens chose each expert."""

    bank: str
    """Kind of bank within its layer, ``mlp`` or ``attention``."""
    layer: int
    """Index of the bank's layer in the model."""
    counts: tuple[int | float, ...]
    """``[logical expert]``: number of tokens that chose the expert."""

    def __post_init__(self) -> None:
        where = f"load of bank {self.bank} layer {self.layer}"
        check(bool(self.counts), where, "no counts", "must have a count for each expert")
        bad = [c for c in self.counts if not 0 <= c <= sys.float_info.max]
        check(not bad, where, bad[0] if bad else None, "counts must be finite and not negative")


class LoadProfile(msgspec.Struct, frozen=True, kw_only=True):
    """Expert load of all banks over ``tokens`` tokens."""

    model: str
    """Name of the model whose load was measured."""
    top_k: int
    """Number of experts that each token chooses."""
    tokens: int
    """Number of tokens that were counted."""
    banks: tuple[BankLoad, ...]
    """Load of each bank, one entry per bank."""

    def __post_init__(self) -> None:
        check(self.top_k >= 1, "load_profile.top_k", self.top_k, "must be at least 1")
        check(self.tokens >= 0, "load_profile.tokens", self.tokens, "must not be negative")
        keys = [(b.bank, b.layer) for b in self.banks]
        check(len(set(keys)) == len(keys), "load_profile.banks", keys, "must name each bank once")

    @property
    def bank_shapes(self) -> list[BankShape]:
        """Kind, layer and number of experts of each bank, without load."""
        return [
            BankShape(bank=b.bank, layer=b.layer, num_experts=len(b.counts)) for b in self.banks
        ]

    def counts(self, bank: str, layer: int) -> tuple[float, ...]:
        """Token counts of one bank's experts; empty if the profile does not have the bank."""
        return next((b.counts for b in self.banks if (b.bank, b.layer) == (bank, layer)), ())

    def merge(self, other: LoadProfile) -> LoadProfile:
        """Return the sum of two profiles. Raises ``ConfigError`` if banks, experts or top_k
        differ."""
        check(
            self.shape() == other.shape(),
            "load_profile",
            other.model,
            f"must have the banks, experts and top_k of {self.model}",
        )
        banks = tuple(
            replace(b, counts=tuple(map(add, b.counts, other.counts(b.bank, b.layer))))
            for b in self.banks
        )
        return replace(self, tokens=self.tokens + other.tokens, banks=banks)

    def shape(self) -> tuple[int, frozenset[tuple[str, int, int]]]:
        """Properties that profiles must share to be merged: top_k and the shapes of all banks."""
        return self.top_k, frozenset((b.bank, b.layer, len(b.counts)) for b in self.banks)

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as plain data in the file format."""
        return {"schema": SCHEMA, **to_plain(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoadProfile:
        """Read a profile from plain data in the file format. Raises ``ConfigError`` with the
        invalid field."""
        schema = data.get("schema") if isinstance(data, Mapping) else data
        check(schema == SCHEMA, "load_profile.schema", schema, "must be 1")
        return from_plain(
            data, cls, lambda why: ConfigError("load_profile", why, "is not a load profile")
        )


def load_profile(path: Path) -> LoadProfile:
    """Read a load profile from a file. Raises ``ConfigError`` if the file cannot be read or is
    not a load profile."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as err:
        raise ConfigError("load_profile", path.name, f"cannot be read: {err}") from err
    return LoadProfile.from_dict(data)


def device_loads(placement: BankPlacement, counts: Sequence[float]) -> tuple[float, ...]:
    """Return the number of tokens of each device, if an expert's tokens are divided among its
    copies by split weight. ``counts``: tokens of each expert."""
    return tuple(
        sum(
            share * counts[expert]
            for expert, share in zip(slots, shares, strict=True)
            if expert != FREE_SLOT
        )
        for slots, shares in zip(placement.physical_to_logical, placement.split, strict=True)
    )
