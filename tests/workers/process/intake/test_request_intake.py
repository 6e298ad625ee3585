"""A request passes named states on its way to the engine, and waits for KV blocks once in all."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.core.errors import ExpertMeshError, QueueFullError
from workers.process.intake.commands import AddRequest
from workers.process.intake.grammar_compilations import CompiledRequest
from workers.process.intake.intake_request import IntakeRequest, IntakeState
from workers.process.intake.request_intake import RequestIntake
from workers.requests.request import Grammar, GrammarKind, Request, SamplingParams
from workers.requests.wire import Abort


@dataclass
class Source:
    """A source of KV blocks, or the compilations, that a test lets end."""

    has_blocks: bool = True
    is_shared: bool = False
    limit: float = 2.0
    expected: str = ""
    num_free_jobs: int = 9
    blocks: int = 0
    """Free blocks that a wait takes."""
    pool: Any = None
    asked: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    waiting: list[IntakeRequest] = field(default_factory=list)
    done: list[Any] = field(default_factory=list)

    def has_prefetch(self, request: Request) -> bool:
        return request.request_id == self.expected

    def limit_s(self, num_tokens: int) -> float:
        return self.limit

    def put(self, waiting: IntakeRequest) -> bool:
        self.asked.append(waiting.name)
        if self.has_blocks:
            if self.is_shared:
                waiting.has_joined = True
            self.pool.num_free -= self.blocks
            self.waiting.append(waiting)
        return self.has_blocks

    def take(self) -> list[Any]:
        done, self.done = self.done, []
        return done

    def drop(self, name: str) -> None:
        self.dropped.append(name)
        self.waiting = [waiting for waiting in self.waiting if waiting.name != name]

    def drop_gateway(self, gateway: str) -> None:
        pass

    def wait_s(self, at_most_s: float) -> float:
        return at_most_s

    def end(self) -> None:
        """Nothing more comes for what waits here."""
        self.done, self.waiting = self.waiting, []

    def compile(self) -> None:
        """What waits here has its grammar."""
        self.done, self.waiting = [CompiledRequest(w, None) for w in self.waiting], []


class Engine:
    """Notes what it gets."""

    def __init__(self) -> None:
        self.pool = SimpleNamespace(num_free=9)
        self.added: list[Request] = []
        self.grammars: list[object] = []
        self.admissible: list[Request] = []
        self.waits: dict[str, int] = {}
        self.is_full = False

    def add_request(self, request: Request, received: float, grammar: object, hashes: Any) -> None:
        if self.is_full:
            raise QueueFullError("too much waits")
        self.added.append(request)
        self.grammars.append(grammar)

    def take_admissible(self, at_most: int) -> list[tuple[Request, tuple[bytes, ...]]]:
        taken, self.admissible = self.admissible, []
        return [(request, ()) for request in taken]

    @property
    def requests(self) -> set[str]:
        """Ids of those that it has."""
        return {request.request_id for request in self.added}

    def wait_for_kv(self, name: str, num_coming: int) -> None:
        self.waits[name] = num_coming

    def end_kv_wait(self, name: str) -> None:
        self.waits.pop(name, None)

    def abort(self, name: str, choices: tuple[int, ...] = ()) -> None:
        self.added = [request for request in self.added if request.request_id != name]


class World:
    """An intake between fakes, with a clock of its own."""

    def __init__(self) -> None:
        self.now, self.engine = 100.0, Engine()
        self.tier, self.peer, self.compilations = Source(), Source(), Source()
        for source in (self.tier, self.peer, self.compilations):
            source.pool = self.engine.pool
        self.known: dict[Grammar, object] = {}
        """Compiled grammars."""
        self.owners: dict[str, str] = {}
        self.refused: list[tuple[str, ExpertMeshError]] = []
        make: Any = RequestIntake
        self.intake: RequestIntake = make(
            *(
                self.engine,
                self,
                SimpleNamespace(cached=lambda grammar, _: self.known.get(grammar)),
            ),
            *(self.compilations, self.peer, [self.tier, self.peer]),
            *(lambda: True, lambda: self.now),
        )

    def accept(self, gateway: str, request: Request) -> None:
        self.owners[request.request_id] = gateway

    def refuse(self, gateway: str, request: Request, err: ExpertMeshError) -> None:
        self.refused.append((request.request_id, err))

    def forget_ended(self, request_id: str) -> None:
        if request_id not in self.engine.requests:
            self.owners.pop(request_id, None)

    def receive(
        self, name: str, *, grammar: bool = False, attempt: int = 0, **more: Any
    ) -> Request:
        rule = Grammar(kind=GrammarKind.REGEX, text="x") if grammar else None
        params = SamplingParams(grammar=rule)
        made = Request(request_id=name, prompt=(1,), params=params, attempt=attempt, **more)
        self.intake.receive(AddRequest("g", made, 0.0))
        return made

    def admit(self, request: Request) -> None:
        """There is room for a queued request."""
        self.engine.admissible.append(request)
        self.intake.advance()

    def waiting(self) -> dict[str, float]:
        self.intake.advance()
        stats = {"num_requests_waiting": 0.0}
        self.intake.count_waiting(stats)
        return {name.partition('"')[2].rstrip('"}'): n for name, n in stats.items() if n}


def test_a_request_waits_for_blocks_ahead_of_it_then_for_its_grammar() -> None:
    world = World()
    world.peer.expected = "a"
    world.receive("a", grammar=True)
    (waiting,) = world.peer.waiting
    states = [waiting.state]
    world.peer.end()
    world.intake.advance()
    states.append(waiting.state)
    assert world.engine.added == []
    world.compilations.compile()
    world.intake.advance()
    states.append(waiting.state)
    expected = [IntakeState.WAITS_FOR_KV, IntakeState.COMPILES_GRAMMAR, IntakeState.QUEUED]
    assert states == expected
    assert world.owners == {"a": "g"}
    with pytest.raises(Exception, match="compiles its grammar"):
        waiting.enter(IntakeState.COMPILES_GRAMMAR)


def test_a_request_that_the_engine_refuses_ends_with_its_error() -> None:
    world = World()
    world.engine.is_full = True
    world.receive("a")
    ((name, err),) = world.refused
    assert (name, type(err)) == ("a", QueueFullError)
    assert world.owners == {}


def test_sources_are_asked_in_turn_for_a_request_with_room() -> None:
    world = World()
    world.admit(world.receive("a"))
    assert world.engine.waits == {"a": 0}
    assert ([w.name for w in world.tier.waiting], world.peer.waiting) == (["a"], [])
    world.tier.end()
    world.intake.advance()
    assert [w.name for w in world.peer.waiting] == ["a"]
    assert world.engine.waits == {"a": 0}
    world.peer.end()
    world.intake.advance()
    assert world.engine.waits == {}


def test_a_source_that_brought_blocks_for_another_request_is_asked_for_the_rest() -> None:
    world = World()
    world.tier.is_shared = True
    world.admit(world.receive("a"))
    world.tier.end()
    world.tier.is_shared = False
    world.intake.advance()
    assert [w.name for w in world.tier.waiting] == ["a"]
    world.tier.end()
    world.intake.advance()
    assert [w.name for w in world.peer.waiting] == ["a"]


def test_one_limit_of_time_holds_for_all_sources_together() -> None:
    world = World()
    world.tier.limit = 5.0
    world.admit(world.receive("a"))
    world.now += 4.0
    world.tier.end()
    world.intake.advance()
    assert [w.name for w in world.peer.waiting] == ["a"]
    assert world.intake.wait_s(60.0) == pytest.approx(1.0)
    world.now += 1.0
    world.intake.advance()
    assert (world.peer.waiting, world.engine.waits) == ([], {})
    assert world.intake.wait_s(60.0) == 60.0


def test_no_further_source_is_asked_when_the_time_is_over() -> None:
    world = World()
    world.admit(world.receive("a"))
    world.now += 2.0
    world.tier.end()
    world.intake.advance()
    assert (world.peer.asked, world.engine.waits) == ([], {})


def test_a_preempted_request_waits_again_with_a_limit_of_its_own() -> None:
    world = World()
    request = world.receive("a")
    for _ in range(2):
        world.admit(request)
        world.now += 2.0
        world.intake.advance()
        assert (world.tier.waiting, world.engine.waits) == ([], {})


def test_a_newer_attempt_replaces_one_that_waits_and_an_older_one_is_refused() -> None:
    world = World()
    world.receive("a", grammar=True, attempt=1)
    world.receive("a", grammar=True, attempt=2)
    assert [w.request.attempt for w in world.compilations.waiting] == [2]
    world.receive("a", grammar=True, attempt=1)
    ((name, err),) = world.refused
    assert (name, str(err)) == ("a", "the worker already has attempt 2 of request a")
    world.compilations.compile()
    world.intake.advance()
    assert [request.attempt for request in world.engine.added] == [2]


def test_the_same_attempt_replaces_one_that_waits() -> None:
    world = World()
    for _ in range(2):
        world.receive("a", grammar=True, attempt=1)
    assert (len(world.compilations.waiting), world.refused) == (1, [])


def test_a_source_with_a_prefetch_replaces_an_older_attempt_itself() -> None:
    world = World()
    world.peer.expected = "a"
    world.receive("a")
    assert (world.tier.dropped, world.peer.dropped) == (["a"], [])
    world.peer.expected = ""
    world.receive("a", attempt=1)
    assert world.peer.dropped == ["a"]


def test_a_compiled_grammar_is_not_compiled_again() -> None:
    world = World()
    compiled = world.known[Grammar(kind=GrammarKind.REGEX, text="x")] = object()
    world.receive("a", grammar=True)
    assert (world.engine.grammars, world.compilations.asked) == ([compiled], [])


def test_the_engine_knows_how_many_blocks_come() -> None:
    world = World()
    world.tier.blocks = 3
    world.admit(world.receive("a"))
    assert world.engine.waits == {"a": 3}


def test_only_its_gateway_aborts_a_request_in_the_engine() -> None:
    world = World()
    world.receive("a")
    world.intake.abort("another", Abort(request_id="a"))
    assert world.engine.requests == {"a"}
    world.intake.abort("g", Abort(request_id="a"))
    assert (world.engine.requests, world.owners) == (set(), {})


def test_choices_that_wait_are_counted_by_reason_and_adapter() -> None:
    world = World()
    world.peer.expected = "c"
    world.receive("a", grammar=True, n=2, adapter="sql@1")
    world.receive("b", grammar=True)
    world.receive("c", adapter="chat@2")
    world.admit(world.receive("d"))
    assert world.waiting() == {"": 4.0, "grammar": 3.0, "kv": 1.0}
    assert world.intake.count_waiting({"num_requests_waiting": 0.0}) == {
        "sql@1": 2,
        "": 1,
        "chat@2": 1,
    }
    assert world.intake.adapters() == {"sql@1", "chat@2"}
    world.intake.abort("g", Abort(request_id="a"))
    world.intake.abort("another", Abort(request_id="c"))
    assert world.waiting() == {"": 2.0, "grammar": 1.0, "kv": 1.0}
    assert world.intake.adapters() == {"chat@2"}


def test_an_aborted_choice_of_a_request_that_waits_never_runs() -> None:
    world = World()
    world.receive("a", grammar=True, n=2)
    world.intake.abort("g", Abort(request_id="a", choices=(1,)))
    world.compilations.compile()
    world.intake.advance()
    assert [request.closed_choices for request in world.engine.added] == [(1,)]


def test_requests_of_a_gateway_that_has_gone_are_dropped() -> None:
    world = World()
    world.peer.expected = "b"
    world.receive("a", grammar=True)
    world.receive("b")
    world.intake.drop_gateway("g")
    assert (world.compilations.waiting, world.peer.waiting) == ([], [])
    assert world.waiting() == {}
