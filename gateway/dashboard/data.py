"""Data of the dashboard as plain values: state, history of ten minutes, load of experts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.core.errors import NotReadyError, RequestError
from gateway.auth.auth import NUMBERS_BY_EXPERT, KeyRing, check_operator, is_operator
from gateway.calls.gateway import Gateway
from gateway.cluster.client_view import client_samples
from gateway.cluster.shared_result import SharedResult
from gateway.observability.samples import TOTALS, Sample, merge_samples

_LEFT_OUT = ("metrics", "version", "changes")
"""Fields of the status that the page does not use."""
_STATS = ("num_requests_running", "num_requests_waiting")
"""Stats of a worker that the page shows."""
MAX_EVENTS = 100
"""Maximum number of events that the page shows, the newest ones."""
_AGE_S = 1.0
"""Seconds for which pages share a result, which the controller collects from all workers."""


class PageData:
    """Data of the dashboard page on one port: state, history and expert load."""

    def __init__(self, gateway: Gateway, keys: KeyRing) -> None:
        self._gateway = gateway
        self._keys = keys
        self._snapshot = SharedResult(self._ask_snapshot, _AGE_S)
        self._load = SharedResult(self._ask_load, _AGE_S)

    async def state(self) -> dict[str, Any]:
        """Return the state of the cluster (as ``status --json``) and the counts of all replicas,
        including ended ones.

        Leaves out what the page does not show: most stats of workers, and old events. Adds
        ``sees_experts``, whether the key may see the load of experts, and ``scheme``, the URL
        scheme of the gateway's own ports, without regard to proxies.
        """
        snapshot, replicas = await asyncio.gather(
            self._snapshot.get(), self._gateway.status.replicas.call("summary")
        )
        described = [one["describe"] for one in replicas.values()]
        is_whole = is_operator(self._keys)
        ended = self._gateway.counts.ended(replicas).values()
        status = self._gateway.status.combine(snapshot, described, is_whole)
        return {
            "schema": 1,
            "time": time.time(),
            "sees_experts": is_whole,
            "status": status,
            "scheme": "https" if self._gateway.limits.has_tls else "http",
            "started": min(one["created"] for one in (*replicas.values(), *ended)),
            "counters": {
                name: sum(one["totals"][name] for one in (*replicas.values(), *ended))
                for name in TOTALS
            },
        }

    async def history(self, after_s: float) -> dict[str, Any]:
        """Return the samples of the last ten minutes that begin after a Unix time in seconds.

        With a client's key, values that depend on experts are omitted.
        """
        rings = await self._gateway.status.replicas.call("samples", after_s)
        ended = self._gateway.counts.ended(rings).values()
        past = [[s for s in one["samples"] if s["time"] > after_s] for one in ended]
        samples: list[Sample] = merge_samples(rings.values(), past)
        shown = samples if is_operator(self._keys) else client_samples(samples)
        return {"schema": 1, "time": time.time(), "samples": shown}

    async def bank_load(self, number: int) -> dict[str, Any]:
        """Return the load of one expert bank, by worker and expert, and the balance of all banks.

        Args:
            number: index of the bank.

        Raises:
            PermissionDeniedError: the caller is not an operator.
            RequestError: there is no such bank.
            NotReadyError: the controller does not respond, or the epoch has just changed.
        """
        check_operator(self._keys, NUMBERS_BY_EXPERT)
        load, placement = await self._load.get()
        return _bank(load, placement, number)

    async def _ask_snapshot(self) -> dict[str, Any] | None:
        """Return the parts of the cluster's state that the page shows; None if none is known."""
        snapshot = await self._gateway.shared.models.default.numbers.snapshot()
        if snapshot is None:
            return None
        shown = {name: part for name, part in snapshot.items() if name not in _LEFT_OUT}
        shown["history"] = list(snapshot.get("history", ()))[-MAX_EVENTS:]
        shown["workers"] = [
            {**one, "stats": {name: one["stats"][name] for name in _STATS if name in one["stats"]}}
            for one in snapshot.get("workers", ())
        ]
        return shown

    async def _ask_load(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Return load and placement. Raises ``NotReadyError`` if their epochs differ."""
        numbers = self._gateway.shared.models.default.numbers
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
    """For each worker, ``[expert, tokens in this epoch]`` of each used slot."""
    return [
        [
            [expert, tokens[device][slot] if tokens is not None else 0]
            for slot, expert in enumerate(slots)
            if expert >= 0
        ]
        for device, slots in enumerate(holders)
    ]
