"""States of the cluster and of one worker, and which may follow which.

    STARTING ──▶ SERVING ◀──▶ RECOVERING ◀──▶ DEGRADED ──▶ SERVING
        └──────────┴── any ──────┴───────────────┘
                     ▼
                 DRAINING ──▶ STOPPED

A start is all or nothing: STARTING goes to SERVING or, through DRAINING, to STOPPED. A degraded
cluster is whole again without another generation when scaling removes its empty places.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from enum import Enum
from typing import TypeVar

StateT = TypeVar("StateT", bound=Enum)
Transitions = Mapping[StateT, Set[StateT]]
"""By state, those that may follow; none follows a state that is missing."""


class ClusterState(Enum):
    """What the whole cluster is doing."""

    STARTING = "STARTING"
    """Workers are placed and load; nothing is served yet."""
    SERVING = "SERVING"
    """A generation of all desired workers runs."""
    DEGRADED = "DEGRADED"
    """Less than desired: fewer workers, or (``experts_complete`` false) experts without a copy."""
    RECOVERING = "RECOVERING"
    """The survivors form a new generation; requests wait."""
    DRAINING = "DRAINING"
    """Workers are being ended."""
    STOPPED = "STOPPED"
    """No worker is left."""


class WorkerState(Enum):
    """What one worker is doing."""

    STARTING = "STARTING"
    """Its process was asked for; it has not called yet."""
    LOADING = "LOADING"
    """It is registered and reads weights. Also shown in place of READY while it reads adapters."""
    READY = "READY"
    """Weights are in memory; it is in no running generation."""
    SERVING = "SERVING"
    """It takes part in the running generation."""
    DRAINING = "DRAINING"
    """Shown in place of the two before while it takes no new request; never entered."""
    LOST = "LOST"
    """It is gone, or declared so; it never comes back under this name."""
    DRAINED = "DRAINED"
    """It was emptied and ended on purpose; it never comes back under this name."""


class AdapterState(Enum):
    """What happens to an adapter."""

    LOADING = "LOADING"
    """Workers read it; no request may name it."""
    READY = "READY"
    """Requests may name it."""
    UNLOADING = "UNLOADING"
    """No new request may name it; those that have it go on."""


GONE = frozenset({WorkerState.LOST, WorkerState.DRAINED})
"""States of workers that never come back under their names."""
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
    """A state was to follow one that it cannot follow: a mistake in our own code."""


def next_state(old: StateT, new: StateT, allowed: Transitions[StateT] | None = None) -> StateT:
    """``new``, if it may follow ``old``. Raises ``IllegalTransitionError``."""
    if new not in (_NEXT if allowed is None else allowed).get(old, ()):
        raise IllegalTransitionError(f"{type(old).__name__}: {old.value} -> {new.value}")
    return new


def is_gone(state: str) -> bool:
    """Whether a worker whose state is shown so never comes back under its name."""
    return any(state == gone.value for gone in GONE)
