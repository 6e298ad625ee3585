"""States of the cluster and of one worker, and the allowed transitions.

    STARTING ──▶ SERVING ◀──▶ RECOVERING ◀──▶ DEGRADED ──▶ SERVING
        └──────────┴── any ──────┴───────────────┘
                     ▼
                 DRAINING ──▶ STOPPED

A start is all or nothing: STARTING goes to SERVING or, through DRAINING, to STOPPED. A degraded
cluster can become complete without another generation, if scaling removes its empty places.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from enum import Enum
from typing import TypeVar

StateT = TypeVar("StateT", bound=Enum)
Transitions = Mapping[StateT, Set[StateT]]
"""Allowed next states by state; a state that is missing is final."""


class ClusterState(Enum):
    """State of the whole cluster."""

    STARTING = "STARTING"
    """Workers start and load; nothing is served yet."""
    SERVING = "SERVING"
    """A generation of all desired workers runs."""
    DEGRADED = "DEGRADED"
    """Fewer workers than desired, or (``experts_complete`` false) experts without a copy."""
    RECOVERING = "RECOVERING"
    """The survivors form a new generation; requests wait."""
    DRAINING = "DRAINING"
    """Workers are being ended."""
    STOPPED = "STOPPED"
    """No worker is left."""


class WorkerState(Enum):
    """State of one worker."""

    STARTING = "STARTING"
    """Its process was requested; it has not registered yet."""
    LOADING = "LOADING"
    """It has registered and reads weights. Also shown instead of READY while it reads adapters."""
    READY = "READY"
    """Weights are in memory; it is in no running generation."""
    SERVING = "SERVING"
    """It takes part in the running generation."""
    DRAINING = "DRAINING"
    """Shown instead of READY and SERVING while it takes no new requests; never entered."""
    LOST = "LOST"
    """It has ended or was declared lost; its name is not used again."""
    DRAINED = "DRAINED"
    """It was drained and ended on purpose; its name is not used again."""


class AdapterState(Enum):
    """State of an adapter."""

    LOADING = "LOADING"
    """Workers read it; no request may name it."""
    READY = "READY"
    """Requests may name it."""
    UNLOADING = "UNLOADING"
    """No new request may name it; running ones continue."""


GONE = frozenset({WorkerState.LOST, WorkerState.DRAINED})
"""Final states of workers."""
_NEXT: Transitions[Enum] = {
    ClusterState.STARTING: {ClusterState.SERVING, ClusterState.DRAINING},
    ClusterState.SERVING: {ClusterState.RECOVERING, ClusterState.DEGRADED, ClusterState.DRAINING},
    ClusterState.DEGRADED: {
        ClusterState.RECOVERING,
        ClusterState.SERVING,
        ClusterState.DRAINING,
    },
    ClusterState.RECOVERING: {ClusterState.SERVING, ClusterState.DEGRADED, ClusterState.DRAINING},
    ClusterState.DRAINING: {ClusterState.STOPPED},
    WorkerState.STARTING: {WorkerState.LOADING, WorkerState.LOST},
    WorkerState.LOADING: {WorkerState.READY, WorkerState.LOST},
    WorkerState.READY: {WorkerState.SERVING, WorkerState.LOST, WorkerState.DRAINED},
    WorkerState.SERVING: {WorkerState.READY, WorkerState.LOST, WorkerState.DRAINED},
    AdapterState.LOADING: {AdapterState.READY},
    AdapterState.READY: {AdapterState.UNLOADING},
}


class IllegalTransitionError(AssertionError):
    """An invalid state transition: a bug in expertmesh."""


def next_state(old: StateT, new: StateT, allowed: Transitions[StateT] | None = None) -> StateT:
    """Return ``new`` if it may follow ``old``. Raises ``IllegalTransitionError``."""
    if new not in (_NEXT if allowed is None else allowed).get(old, ()):
        raise IllegalTransitionError(f"{type(old).__name__}: {old.value} -> {new.value}")
    return new


def is_gone(state: str) -> bool:
    """Return whether a shown state is final."""
    return any(state == gone.value for gone in GONE)
