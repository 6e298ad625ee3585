"""Admitted requests of each tenant, and the work ahead of a new request. Pure.

The engines serve tenants in proportion to their weights, by tokens
(``workers.scheduling.fairness``); within a tenant, lower priority values run first. Admission
assumes the same order. Therefore a long queue of one tenant neither delays requests of other
tenants nor causes their refusal.

The demands are kept in arrays, with a row for each tenant and one for each priority of a tenant. An
admission changes one row of each, and no Python loop visits all tenants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.requests.request import Request

_LEAST_WEIGHT = 1e-200
"""Least weight relative to the highest, so that sequences divided by weights do not overflow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallDemand:
    """Resources that a call requests (sequences, tokens), with its tenant and priority."""

    num_requests: int = 1
    """Number of engine requests of the call, one per prompt."""
    num_choices: int = 1
    """Number of choices per request. Each choice is one sequence at the engines."""
    num_tokens: int = 1
    """Maximum number of prompt and output tokens of all requests of the call."""
    num_bytes: int = 0
    """Number of bytes of the call's prompt embeddings."""
    tenant: str = ""
    weight: float = 1.0
    """Weight of the tenant; engines serve tenants in proportion to their weights."""
    priority: int = 0
    """Priority of the call; lower values run first within a tenant."""

    @classmethod
    def of(cls, requests: Sequence[Request]) -> CallDemand:
        """Return the demand of a call from its engine requests, at least one."""
        first = requests[0]
        num_tokens = sum(len(one.prompt) + one.n * one.params.max_tokens for one in requests)
        return cls(
            num_requests=len(requests),
            num_choices=first.n,
            num_tokens=num_tokens,
            num_bytes=sum(len(e.data) for one in requests if (e := one.prompt_embeds) is not None),
            tenant=first.tenant,
            weight=first.weight,
            priority=first.priority,
        )

    @property
    def num_seats(self) -> int:
        """Number of sequences that the call has at the engines."""
        return self.num_requests * self.num_choices


@dataclass(slots=True)
class HeldDemand:
    """Sum of the demands of admitted calls that have not ended."""

    num_requests: int = 0
    num_seats: int = 0
    num_tokens: int = 0
    num_bytes: int = 0

    def add(self, demand: CallDemand, sign: int) -> None:
        self.num_requests += sign * demand.num_requests
        self.num_seats += sign * demand.num_seats
        self.num_tokens += sign * demand.num_tokens
        self.num_bytes += sign * demand.num_bytes


class TenantQueues:
    """Demand of the running and waiting requests of all tenants, by priority."""

    def __init__(self) -> None:
        self._totals: dict[str, HeldDemand] = {}
        self._held: dict[tuple[str, int], HeldDemand] = {}
        self._tenants = _Rows(weight=np.float64, seats=np.float64)
        self._entries = _Rows(
            tenant=np.int64,
            priority=np.int64,
            before=np.float64,
            seats=np.float64,
            tokens=np.float64,
        )
        self._tenant_rows: dict[str, int] = {}
        self._entry_rows: dict[tuple[str, int], int] = {}
        self._shared: tuple[float, NDArray[np.float64], NDArray[np.float64]] | None = None
        """Capacity, and waiting tokens of each entry and each tenant, until a demand changes."""
        self._level = 0.0
        """Level of the last ``_running``, at which the next one begins its search."""
        self._ahead: dict[tuple[str, int], float] = {}
        """Results of ``tokens_ahead`` for this capacity: a call asks several times."""

    def __len__(self) -> int:
        """Number of tenants with requests."""
        return len(self._totals)

    def __contains__(self, tenant: str) -> bool:
        return tenant in self._totals

    def total(self, tenant: str) -> HeldDemand:
        """Return the demand of a tenant's requests of all priorities."""
        return self._totals.get(tenant, HeldDemand())

    def add(self, demand: CallDemand, sign: int) -> None:
        """Add the demand of a call (``sign`` 1), or remove it (``sign`` -1).

        An added call sets the weight of its tenant.
        """
        self._shared = None
        self._ahead.clear()
        tenant, key = demand.tenant, (demand.tenant, demand.priority)
        if key not in self._held:
            self._begin(tenant, demand.priority)
        total, held = self._totals[tenant], self._held[key]
        total.add(demand, sign)
        held.add(demand, sign)
        row, entry = self._tenant_rows[tenant], self._entry_rows[key]
        tenants, entries = self._tenants, self._entries
        tenants["seats"][row] = total.num_seats
        if sign > 0:
            tenants["weight"][row] = demand.weight
        entries["seats"][entry] = held.num_seats
        entries["tokens"][entry] = held.num_tokens
        if held.num_seats < total.num_seats:  # the tenant has other priorities
            later = (entries["tenant"] == row) & (entries["priority"] > demand.priority)
            entries["before"][later] += sign * demand.num_seats
        if not held.num_requests:
            self._end(tenant, demand.priority)

    def share_seats(self, capacity: float) -> dict[str, float]:
        """Return the number of running sequences of each tenant, at most ``capacity`` in all.

        A tenant gets a share by weight, plus a part of the shares that other tenants do not use.

        Example: capacity 64, a has 8 sequences, b 100, c 100, equal weights: a runs 8, b 28, c 28.
        """
        seats = self._running(capacity)
        return {tenant: float(seats[row]) for tenant, row in self._tenant_rows.items()}

    def tokens_ahead(self, capacity: float, tenant: str, priority: int) -> float:
        """Return the number of waiting tokens that the engines serve before a new request.

        These are N tokens of its ``tenant``, with priority values up to ``priority``, and of each
        other tenant T at most N * (weight of T / own weight). ``capacity``: sequences that run at a
        time.
        """
        row = self._tenant_rows.get(tenant)
        if row is None:
            return 0.0
        if self._shared is None or self._shared[0] != capacity:
            self._shared = (capacity, *self._waiting(capacity))
            self._ahead.clear()
        if (known := self._ahead.get((tenant, priority))) is not None:
            return known
        _, of_entries, of_tenants = self._shared
        entries, weights = self._entries, self._tenants["weight"]
        if self._held.get((tenant, priority)) == self._totals[tenant]:  # it has no other priority
            first = float(of_tenants[row])
        else:
            own = (entries["tenant"] == row) & (entries["priority"] <= priority)
            first = float(of_entries[own].sum())
        ahead = np.minimum(of_tenants, first * (weights / weights[row]))
        ahead[row] = first
        self._ahead[tenant, priority] = found = float(ahead.sum())
        return found

    def _waiting(self, capacity: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the waiting tokens of each entry, and of each tenant."""
        running, entries = self._running(capacity), self._entries
        owners, seats = entries["tenant"], entries["seats"]
        runs = np.minimum(np.maximum(running[owners] - entries["before"], 0.0), seats)
        waiting = entries["tokens"] * (1.0 - runs / np.maximum(seats, 1.0))
        of_tenants = np.bincount(owners, waiting, len(running)).astype(np.float64, copy=False)
        return waiting, of_tenants

    def _running(self, capacity: float) -> NDArray[np.float64]:
        """Return the number of running sequences of each tenant.

        All tenants that want more run ``level`` sequences for each unit of weight, so that all run
        ``capacity``. Newton's method finds the level, from that of the last call on: the running
        sequences are concave in the level, so that it only rises after the first step.
        """
        weights, seats = self._tenants["weight"], self._tenants["seats"]
        if capacity >= seats.sum():
            return seats.copy()
        weights = np.maximum(weights / weights.max(), _LEAST_WEIGHT)
        level, is_first = self._level, True
        while True:
            wants_more = seats > level * weights
            slope = weights @ wants_more
            better = (capacity - seats @ ~wants_more) / slope if slope else 0.0
            if better == level or not (is_first or better > level):
                self._level = level
                running: NDArray[np.float64] = np.minimum(seats, level * weights)
                return running
            level, is_first = better, False

    def _begin(self, tenant: str, priority: int) -> None:
        if tenant not in self._totals:
            self._totals[tenant] = HeldDemand()
            self._tenant_rows[tenant] = self._tenants.take()
        row, entries = self._tenant_rows[tenant], self._entries
        before = 0.0
        if self._totals[tenant].num_requests:
            earlier = (entries["tenant"] == row) & (entries["priority"] < priority)
            before = float(entries["seats"].sum(where=earlier))
        self._held[tenant, priority] = HeldDemand()
        self._entry_rows[tenant, priority] = entry = self._entries.take()
        for name, value in (("tenant", row), ("priority", priority), ("before", before)):
            entries[name][entry] = value

    def _end(self, tenant: str, priority: int) -> None:
        del self._held[tenant, priority]
        self._entries.free(self._entry_rows.pop((tenant, priority)))
        if not self._totals[tenant].num_requests:
            del self._totals[tenant]
            self._tenants.free(self._tenant_rows.pop(tenant))


class _Rows:
    """Named columns of equal length."""

    def __init__(self, **columns: type[np.generic]) -> None:
        self._columns = {name: np.zeros(16, kind) for name, kind in columns.items()}
        self._free = list(reversed(range(16)))

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._columns[name]

    def take(self) -> int:
        """Return a free row, in which the caller sets all columns. They may become other arrays."""
        if not self._free:
            length = len(next(iter(self._columns.values())))
            self._columns = {
                n: np.concatenate((c, np.zeros_like(c))) for n, c in self._columns.items()
            }
            self._free = list(reversed(range(length, 2 * length)))
        return self._free.pop()

    def free(self, row: int) -> None:
        """Free a row, and set it to zeros, so that it does not count in sums."""
        for column in self._columns.values():
            column[row] = 0
        self._free.append(row)
