"""States of the cluster, of a worker and of a LoRA adapter, and the allowed transitions.

    STARTING ──▶ SERVING ◀──▶ RECOVERING ◀──▶ DEGRADED ◀──▶ SERVING
        └──────────┴── any ──────┴───────────────┘
                     ▼
                 DRAINING ──▶ STOPPED

A start succeeds completely or not at all: STARTING leads to SERVING or, through DRAINING, to
STOPPED. If scaling removes the empty places of a degraded cluster, the cluster serves again without
another generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from enum import Enum
from typing import TypeVar

StateT = TypeVar("StateT", bound=Enum)
Transitions = Mapping[StateT, Set[StateT]]
"""Allowed next states, by state. A state that is not a key is final."""


class ClusterState(Enum):
    """State of the whole cluster."""

    STARTING = "STARTING"
    """Workers start and load; the cluster does not serve yet."""
    SERVING = "SERVING"
    """A generation of all desired workers runs."""
    DEGRADED = "DEGRADED"
    """Workers are missing. The others serve, unless an expert has no copy (``experts_complete`` is
    false) or no attention worker is left."""
    RECOVERING = "RECOVERING"
    """The remaining workers form a new generation; meanwhile requests wait."""
    DRAINING = "DRAINING"
    """The cluster is ending: its workers are being ended."""
    STOPPED = "STOPPED"
    """All workers of the cluster have ended."""


class WorkerState(Enum):
    """State of one worker."""

    STARTING = "STARTING"
    """The worker's process was requested, but the worker has not registered yet."""
    LOADING = "LOADING"
    """The worker has registered and reads weights. Shown instead of READY also while it reads
    adapters."""
    READY = "READY"
    """The worker's weights are in memory, but it is in no running generation."""
    SERVING = "SERVING"
    """The worker takes part in the running generation."""
    DRAINING = "DRAINING"
    """The worker accepts no new requests. This state is only shown, instead of READY or SERVING."""
    LOST = "LOST"
    """The worker has ended unexpectedly or was declared lost. Its name is never reused."""
    DRAINED = "DRAINED"
    """The worker was drained and ended by a command. Its name is never reused."""


class AdapterState(Enum):
    """State of a LoRA adapter."""

    LOADING = "LOADING"
    """Workers read the adapter; requests cannot use it yet."""
    READY = "READY"
    """Requests can use the adapter."""
    UNLOADING = "UNLOADING"
    """New requests cannot use the adapter; running requests continue to use it."""


GONE = frozenset({WorkerState.LOST, WorkerState.DRAINED})
"""Final states of workers: lost, or drained and ended."""
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
    """A state transition that is not allowed: a bug in expertmesh."""


def next_state(old: StateT, new: StateT, allowed: Transitions[StateT] | None = None) -> StateT:
    """Return ``new`` if it may follow ``old``; raise ``IllegalTransitionError`` if not.

    ``allowed``: next states by state; by default the transitions of cluster, workers and adapters.
    """
    if new not in (_NEXT if allowed is None else allowed).get(old, ()):
        raise IllegalTransitionError(f"{type(old).__name__}: {old.value} -> {new.value}")
    return new


def is_gone(state: str) -> bool:
    """Return whether the text of a worker's state (such as ``LOST``) names a final state."""
    return any(state == gone.value for gone in GONE)
