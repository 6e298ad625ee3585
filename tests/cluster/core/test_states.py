"""Which state may follow which."""

from __future__ import annotations

import itertools

import pytest

from cluster.core.states import (
    ClusterState,
    IllegalTransitionError,
    WorkerState,
    next_state,
)


def _next(state: ClusterState) -> set[str]:
    found = set()
    for other in ClusterState:
        try:
            found.add(next_state(state, other).value)
        except IllegalTransitionError:
            continue
    return found


def test_a_start_ends_in_serving_or_is_ended_again() -> None:
    assert _next(ClusterState.STARTING) == {"SERVING", "DRAINING"}


def test_stopped_is_final() -> None:
    assert _next(ClusterState.STOPPED) == set()


def test_every_state_but_stopped_can_be_drained() -> None:
    for state in ClusterState:
        if state not in (ClusterState.DRAINING, ClusterState.STOPPED):
            assert "DRAINING" in _next(state)


def test_draining_only_ends() -> None:
    assert _next(ClusterState.DRAINING) == {"STOPPED"}


def test_an_illegal_transition_names_both_states() -> None:
    with pytest.raises(IllegalTransitionError, match="ClusterState: STOPPED -> SERVING"):
        next_state(ClusterState.STOPPED, ClusterState.SERVING)


def test_a_worker_goes_through_its_life_in_order() -> None:
    life = [WorkerState.STARTING, WorkerState.LOADING, WorkerState.READY, WorkerState.SERVING]
    for old, new in itertools.pairwise(life):
        assert next_state(old, new) is new
        assert next_state(old, WorkerState.LOST) is WorkerState.LOST


def test_a_lost_worker_never_comes_back() -> None:
    for state in WorkerState:
        with pytest.raises(IllegalTransitionError):
            next_state(WorkerState.LOST, state)
