"""What the web page shows, as plain data: the cluster's state, and the replicas' counts.

Rates and percentiles are left to the page: it has two answers to compare, this process has one.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cluster.core.errors import NotReadyError, RequestError
from cluster.core.metric_families import PlainFamily
from gateway.auth.auth import NUMBERS_BY_EXPERT, KeyRing, check_operator, is_operator
from gateway.cluster.recent import Recent
from gateway.core.replay import ReplayCause
from gateway.generation.gateway import Gateway

COUNTERS = ("prompt_tokens_total", "generation_tokens_total")
"""Counts of the gateway that the page shows as rates."""
HISTOGRAMS = ("time_to_first_token_seconds", "inter_token_latency_seconds")
"""Histograms of the gateway that the page shows as percentiles."""
_LEFT_OUT = ("metrics", "version")
"""Parts of the status that the page has no use for."""
_AGE_S = 1.0
"""For how long pages share what the controller has answered, which asks all workers for it."""


class PageData:
    """What the pages of one port show."""

    def __init__(self, gateway: Gateway, keys: KeyRing) -> None:
        self._gateway = gateway
        self._keys = keys
        self._snapshot = Recent(gateway.numbers.snapshot, _AGE_S)
        self._load = Recent(self._ask_load, _AGE_S)

    async def state(self) -> dict[str, Any]:
        """The cluster's state (as ``status --json``), and what all replicas have counted.

        ``sees_experts`` says whether the key of the page shows the load of experts too.
        """
        snapshot, replicas = await asyncio.gather(
            self._snapshot.get(), self._gateway.replicas.ask("summary")
        )
        described = [one["describe"] for one in replicas.values()]
        is_whole = is_operator(self._keys)
        status = self._gateway.status_of(snapshot, described, is_whole)
        families = [family for one in replicas.values() for family in one["metrics"]]
        return {
            "schema": 1,
            "time": time.time(),
            "sees_experts": is_whole,
            "status": {name: part for name, part in status.items() if name not in _LEFT_OUT},
            "counters": {name: _total(families, name) for name in COUNTERS},
            "replayed": _by_cause(families),
            "histograms": {name: _buckets(families, name) for name in HISTOGRAMS},
        }

    async def bank_load(self, number: int) -> dict[str, Any]:
        """The load of one expert bank, by worker and expert, and the balance of all.

        Args:
            number: of the bank, counted from the first.

        Raises:
            PermissionDeniedError: the key is a client's.
            RequestError: there is no such bank.
            NotReadyError: the controller does not answer.
        """
        check_operator(self._keys, NUMBERS_BY_EXPERT)
        load, placement = await self._load.get()
        return _bank(load, placement, number)

    async def _ask_load(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Load and placement of the same epoch."""
        numbers = self._gateway.numbers
        load, placement = await asyncio.gather(numbers.load(), numbers.placement())
        if load["epoch"] != placement["epoch"]:
            raise NotReadyError("the placement has just changed", "not_ready", 1.0)
        return load, placement


def _bank(load: Mapping[str, Any], placement: Mapping[str, Any], number: int) -> dict[str, Any]:
    banks = load["banks"]
    if not 0 <= number < len(banks):
        raise RequestError(f"bank ({number}) must be from 0 to {len(banks) - 1}", "bank")
    bank, holders = banks[number], placement["banks"][number]["physical_to_logical"]
    return {
        "schema": 1,
        "epoch": load["epoch"],
        "tokens": load["tokens"],
        "workers": load["workers"],
        "balancedness": load["balancedness"],
        "banks": [
            {"layer": b["layer"], "bank": b["bank"], "balancedness": b["balancedness"]}
            for b in banks
        ],
        "number": number,
        "layer": bank["layer"],
        "bank": bank["bank"],
        "counts": bank["counts"],
        "copies": bank["copies"],
        "cells": _cells(holders, bank["slots"]),
    }


def _cells(
    holders: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]] | None
) -> list[list[list[int]]]:
    """Of each device ``[expert, tokens in this epoch]`` of each slot that is in use."""
    return [
        [
            [expert, tokens[device][slot] if tokens is not None else 0]
            for slot, expert in enumerate(slots)
            if expert >= 0
        ]
        for device, slots in enumerate(holders)
    ]


def _total(families: Iterable[PlainFamily], name: str) -> float:
    """Sum of a counter's samples."""
    return sum(value for _, value in _samples(families, name))


def _by_cause(families: Iterable[PlainFamily]) -> dict[str, float]:
    """Requests that went on at another worker, by ``ReplayCause``."""
    causes = {cause.value: 0.0 for cause in ReplayCause}
    for labels, value in _samples(families, "requests_replayed_total"):
        causes[labels["cause"]] += value
    return causes


def _buckets(families: Iterable[PlainFamily], name: str) -> list[tuple[float | None, float]]:
    """Upper bound (None: none) and cumulative count of each bucket, all series added up."""
    counts: dict[float, float] = {}
    for labels, value in _samples(families, f"{name}_bucket"):
        bound = float(labels["le"])
        counts[bound] = counts.get(bound, 0.0) + value
    return [(None if math.isinf(bound) else bound, counts[bound]) for bound in sorted(counts)]


def _samples(
    families: Iterable[PlainFamily], name: str
) -> Iterable[tuple[Mapping[str, str], float]]:
    for family in families:
        for sample, labels, value in family["samples"]:
            if sample == name:
                yield labels, value
