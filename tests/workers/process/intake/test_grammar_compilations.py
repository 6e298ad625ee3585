"""Requests wait for their grammar in a thread of its own; no other request waits with them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from msgspec import structs

from cluster.core.errors import RequestError, RequestFailedError
from tests.harness.threads import fail_to_start
from workers.process.intake.grammar_compilations import (
    COMPILE_LIMIT_S,
    MAX_COMPILING,
    MAX_THREADS,
    GrammarCompilations,
)
from workers.process.intake.intake_request import IntakeRequest
from workers.requests.request import Grammar, GrammarKind, Request, SamplingParams

WAIT_S = 60.0


def command(
    name: str, text: str, gateway: str = "g", attempt: int = 0, n: int = 1, **more: Any
) -> IntakeRequest:
    params = SamplingParams(grammar=Grammar(kind=GrammarKind.REGEX, text=text))
    request = Request(request_id=name, prompt=(1,), params=params, attempt=attempt, n=n, **more)
    return IntakeRequest(gateway, request, 0.0)


@dataclass
class Workshop:
    """A compiler whose work ends when a test says so, with a clock of its own."""

    now: float = 100.0
    begun: list[str] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    woken: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    started: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _ends: dict[str, threading.Event] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def compile(self, grammar: Grammar, owner: str) -> Any:
        """Runs in threads of the compilations."""
        self.begun.append(grammar.text)
        self.started.release()
        assert self._event(grammar.text).wait(WAIT_S)
        result = self.results.get(grammar.text, f"compiled {grammar.text}")
        if isinstance(result, Exception):
            raise result
        return result

    def finish(self, text: str, result: Any = None) -> None:
        """Let one grammar end, and wait until ``wake`` was called."""
        if result is not None:
            self.results[text] = result
        self._event(text).set()
        assert self.woken.acquire(timeout=WAIT_S)

    def wait_started(self, count: int) -> None:
        """Wait until this number of further grammars was begun."""
        for _ in range(count):
            assert self.started.acquire(timeout=WAIT_S)

    def release_all(self) -> None:
        """Let every thread end."""
        for event in self._ends.values():
            event.set()

    def _event(self, text: str) -> threading.Event:
        with self._lock:
            return self._ends.setdefault(text, threading.Event())


@pytest.fixture
def workshop() -> Iterator[Workshop]:
    workshop = Workshop()
    yield workshop
    workshop.release_all()


@pytest.fixture
def waiting(workshop: Workshop) -> Iterator[GrammarCompilations]:
    made = GrammarCompilations(workshop.compile, workshop.woken.release, clock=lambda: workshop.now)
    yield made
    workshop.release_all()
    made.close()


def names(waiting: GrammarCompilations) -> list[str]:
    return [done.waiting.request.request_id for done in waiting.take()]


def test_a_request_comes_out_with_its_grammar(
    workshop: Workshop, waiting: GrammarCompilations
) -> None:
    waiting.put(command("a", "x"))
    assert waiting.take() == []
    workshop.finish("x")
    (done,) = waiting.take()
    assert str(done.compiled) == "compiled x"
    assert done.error is None
    assert waiting.take() == []
    assert waiting.names == []


def test_equal_grammars_are_compiled_once(workshop: Workshop, waiting: GrammarCompilations) -> None:
    waiting.put(command("a", "x"))
    waiting.put(command("b", "x"))
    workshop.finish("x")
    assert names(waiting) == ["a", "b"]
    assert workshop.begun == ["x"]


def test_no_tenant_waits_for_a_grammar_of_another_one(
    workshop: Workshop, waiting: GrammarCompilations
) -> None:
    """The time would tell which grammars others use."""
    waiting.put(command("a", "x", cache_salt="one"))
    waiting.put(command("b", "x", cache_salt="two"))
    waiting.put(command("c", "x", cache_salt="one"))
    workshop.wait_started(2)
    workshop.finish("x")
    assert workshop.woken.acquire(timeout=WAIT_S)
    assert names(waiting) == ["a", "c", "b"]
    assert workshop.begun == ["x", "x"]


def test_a_slow_grammar_holds_up_no_other(workshop: Workshop, waiting: GrammarCompilations) -> None:
    waiting.put(command("slow", "x"))
    waiting.put(command("quick", "y"))
    workshop.finish("y")
    assert names(waiting) == ["quick"]
    assert waiting.names == ["slow"]


def test_the_time_of_a_grammar_begins_when_a_thread_is_free(
    workshop: Workshop, waiting: GrammarCompilations
) -> None:
    for number in range(MAX_THREADS):
        waiting.put(command(f"slow{number}", f"x{number}"))
    for _ in range(MAX_THREADS // MAX_COMPILING):
        workshop.wait_started(MAX_COMPILING)
        workshop.now += COMPILE_LIMIT_S
        assert [type(done.error) for done in waiting.take()] == [RequestError] * MAX_COMPILING
    waiting.put(command("quick", "y"))
    workshop.now += COMPILE_LIMIT_S
    assert waiting.take() == []
    workshop.finish("x0")
    assert waiting.take() == []
    workshop.finish("y")
    assert names(waiting) == ["quick"]


def test_a_grammar_over_its_time_is_refused_by_name(
    workshop: Workshop, waiting: GrammarCompilations
) -> None:
    waiting.put(command("a", "x"))
    workshop.now += COMPILE_LIMIT_S / 2
    assert waiting.take() == []
    assert waiting.wait_s(60.0) == pytest.approx(COMPILE_LIMIT_S / 2)
    workshop.now += COMPILE_LIMIT_S / 2
    (done,) = waiting.take()
    assert isinstance(done.error, RequestError)
    assert done.error.param == "structured_outputs"
    assert "within 2 s" in done.error.message
    workshop.finish("x")  # the thread ends later, without effect
    assert waiting.take() == []
    assert waiting.wait_s(60.0) == 60.0


def test_a_resumed_request_waits_as_long_as_its_grammar_takes(
    workshop: Workshop, waiting: GrammarCompilations
) -> None:
    waiting.put(command("new", "x"))
    waiting.put(command("resumed", "x", attempt=1))
    workshop.now += COMPILE_LIMIT_S
    assert names(waiting) == ["new"]
    assert waiting.wait_s(60.0) == 60.0
    waiting.put(command("newer", "x"))  # its own limit begins now
    waiting.put(command("late", "x", attempt=2))
    workshop.wait_started(2)
    workshop.now += COMPILE_LIMIT_S
    assert names(waiting) == ["newer"]
    assert sorted(waiting.names) == ["late", "resumed"]
    workshop.finish("x")
    assert workshop.woken.acquire(timeout=WAIT_S)
    assert names(waiting) == ["resumed", "late"]
    assert waiting.take() == []


def test_grammars_over_their_time_make_room(
    workshop: Workshop, waiting: GrammarCompilations
) -> None:
    for place in range(MAX_COMPILING):
        waiting.put(command(f"slow{place}", f"x{place}"))
    waiting.put(command("quick", "y"))
    workshop.wait_started(MAX_COMPILING)
    assert sorted(workshop.begun) == [f"x{i}" for i in range(MAX_COMPILING)]
    workshop.now += COMPILE_LIMIT_S
    assert len(waiting.take()) == MAX_COMPILING
    workshop.finish("y")
    assert names(waiting) == ["quick"]


@pytest.mark.parametrize(
    ("failure", "kind"),
    [(RequestError("wrong", "f"), RequestError), (OSError("disk"), RequestFailedError)],
)
def test_errors_come_out_with_the_request(
    workshop: Workshop, waiting: GrammarCompilations, failure: Exception, kind: type[Exception]
) -> None:
    waiting.put(command("a", "x"))
    workshop.finish("x", failure)
    (done,) = waiting.take()
    assert type(done.error) is kind
    assert done.compiled is None
    assert "disk" not in str(done.error)


def test_a_thread_that_cannot_start_ends_its_requests_only(
    workshop: Workshop, waiting: GrammarCompilations, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_start(monkeypatch, "grammar-compiler")
    waiting.put(command("a", "x"))
    assert workshop.woken.acquire(timeout=WAIT_S)
    assert [type(done.error) for done in waiting.take()] == [RequestFailedError]
    monkeypatch.undo()
    waiting.put(command("b", "y"))
    workshop.finish("y")
    assert names(waiting) == ["b"]
    assert workshop.begun == ["y"]


def test_a_choice_that_is_aborted_while_its_request_waits_never_runs(
    workshop: Workshop, waiting: GrammarCompilations
) -> None:
    """A gateway finds a stop string in what an earlier worker had sent."""
    resumed = command("a", "x", attempt=1)
    request = structs.replace(resumed.request, n=4, closed_choices=(2,))
    resumed = replace(resumed, request=request)
    waiting.put(resumed)
    waiting.put(command("b", "x"))
    resumed.close((0,))
    workshop.finish("x")
    assert [done.waiting.request.closed_choices for done in waiting.take()] == [(0, 2), ()]


def test_aborted_requests_and_lost_gateways_are_forgotten(
    workshop: Workshop, waiting: GrammarCompilations
) -> None:
    for name, text, gateway in (("a", "x", "g"), ("b", "x", "h"), ("c", "y", "h"), ("d", "z", "h")):
        waiting.put(command(name, text, gateway))
    waiting.drop("c")
    waiting.drop_gateway("h")
    assert waiting.names == ["a"]
    workshop.finish("x")
    workshop.finish("y")
    assert names(waiting) == ["a"]
    assert "z" not in workshop.begun
