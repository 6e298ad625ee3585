"""Captured steps: their calls of the host, which are kept, and in which memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from workers.cuda.step_graph import MAX_KEPT, StepGraph, StepGraphCache, _capture_stream


class Stream:
    """A stream of a pretended driver."""

    def __init__(self, device: object = None) -> None:
        """Nothing runs on it."""

    def wait_stream(self, other: object) -> None:
        """There is nothing to wait for."""


class Graph:
    """A CUDA graph of a pretended driver, which logs what is done with it."""

    def __init__(self, log: list[str]) -> None:
        self.capture_begin = lambda pool, capture_error_mode: log.append("begin")
        self.capture_end = partial(log.append, "end")
        self.replay = partial(log.append, "replay")
        self.reset = partial(log.append, "reset")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the graphs of the test do."""
    found: list[str] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", partial(Graph, found))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr("workers.cuda.step_graph._capture_stream", _capture_stream.__wrapped__)
    return found


def test_the_host_acts_before_a_replay_and_between_its_graphs(log: list[str]) -> None:
    graph = StepGraph(torch.device("cuda"), None)
    graph.before(partial(log.append, "before"))
    graph.at_end(partial(log.append, "at end"))
    with graph.capture():
        log.append("first")
        graph.between(partial(log.append, "between"))
        log.append("second")
    assert log == ["begin", "first", "end", "begin", "second", "at end", "end"]
    log.clear()
    graph.replay()
    assert log == ["before", "replay", "between", "replay"]


def test_dropped_graphs_are_not_replayed(log: list[str]) -> None:
    graph = StepGraph(torch.device("cuda"), None)
    with graph.capture():
        pass
    log.clear()
    graph.drop()
    graph.drop()
    with pytest.raises(AssertionError, match="the graphs were dropped"):
        graph.replay()
    assert log == ["reset"]


def test_a_capture_that_fails_is_ended_after_its_streams_were_joined(log: list[str]) -> None:
    graph = StepGraph(torch.device("cuda"), None)

    def join() -> None:
        log.append("join")
        raise RuntimeError("lost")

    graph.at_end(join)
    with pytest.raises(ValueError, match="no kernel"), graph.capture():
        raise ValueError("no kernel")
    assert log == ["begin", "join", "end"]


class Captures:
    """Kept steps, each known by its key, on a pretended driver."""

    def __init__(self, max_rows: int) -> None:
        self.kept = StepGraphCache[str](max_rows)
        self.captured: list[str] = []
        self.pools: list[object] = []

    def get(self, key: str, num_rows: int = 1, fails: int = 0) -> str:
        left = [torch.OutOfMemoryError("none left")] * fails

        def capture(pool: object) -> str:
            self.pools.append(pool)
            if left:
                raise left.pop()
            self.captured.append(key)
            return key.upper()

        return self.kept.get(key, num_rows, capture)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Captures]:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return Captures


def test_a_step_is_captured_once(captures: Callable[[int], Captures]) -> None:
    steps = captures(10)
    assert [steps.get(key) for key in "abab"] == ["A", "B", "A", "B"]
    assert steps.captured == ["a", "b"]
    assert len(set(steps.pools)) == 1


def test_what_was_not_used_for_longest_makes_room(captures: Callable[[int], Captures]) -> None:
    steps = captures(8)
    for key in ("a", "b", "a"):
        steps.get(key, 3)
    steps.get("c", 4)
    assert len(steps.kept) == 2
    assert steps.get("a", 3) == "A"
    assert steps.captured == ["a", "b", "c"]
    steps.get("large", 100)
    assert len(steps.kept) == 1


def test_there_is_a_most_of_steps(captures: Callable[[int], Captures]) -> None:
    steps = captures(10_000)
    for number in range(MAX_KEPT + 5):
        steps.get(str(number))
    assert len(steps.kept) == MAX_KEPT


def test_another_state_drops_all_and_takes_other_memory(
    captures: Callable[[int], Captures],
) -> None:
    steps = captures(10)
    steps.kept.keep_only(1)
    steps.get("a")
    steps.kept.keep_only(1)
    assert len(steps.kept) == 1
    steps.kept.keep_only(2)
    assert len(steps.kept) == 0
    steps.get("a")
    assert len(set(steps.pools)) == 2


def test_without_memory_the_others_are_dropped_once(captures: Callable[[int], Captures]) -> None:
    steps = captures(10)
    steps.get("a")
    assert steps.get("b", fails=1) == "B"
    assert len(steps.kept) == 1
    with pytest.raises(torch.OutOfMemoryError):
        steps.get("c", fails=2)
