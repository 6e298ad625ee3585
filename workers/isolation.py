"""Finds the request that kills workers: who was in the steps in which workers died runs alone.

    two deaths with it in the step, none of its rows committed between: a suspect, held back
      ─▶ its turn is offered to its gateway, which notes it and answers
      ─▶ one step alone, cluster-wide
           ─▶ it commits: cleared
           ─▶ a third worker dies: it is failed by name

An expert worker that dies leaves the request here; where this worker itself dies, the gateway knows
from the turn whose step it was. Pure; the time is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from cluster.topology import Generation

MAX_DEATHS = 2
"""Deaths after which a request runs alone."""
ANSWER_LIMIT_S = 1.0
"""Time that a gateway has to take a turn; then others go on, and it is offered again."""


@dataclass(slots=True)
class _Turn:
    request_id: str
    offered_s: float
    is_taken: bool = False


class Companions:
    """With whom this worker runs steps: who was only about to join died of none of them."""

    def __init__(self) -> None:
        self._names: frozenset[str] = frozenset()

    def run(self, generation: Generation) -> None:
        """Steps of this generation run from now on."""
        self._names = frozenset(m.name for m in generation.members)

    def died(self, generation: Generation, drained: Collection[str]) -> frozenset[str]:
        """Those that are not in the next generation, and have not left on purpose. Each once."""
        kept = self._names & {m.name for m in generation.members}
        gone, self._names = self._names - kept, kept
        return gone - frozenset(drained)


class Isolation:
    """Deaths by request, and whose turn it is to run alone."""

    def __init__(self) -> None:
        self._deaths: dict[str, int] = {}  # since the last commit of its rows
        self._hit: dict[str, None] = {}  # in a step that was given up, not committed since
        self._turn: _Turn | None = None

    @property
    def suspects(self) -> frozenset[str]:
        """Requests that must not run with others."""
        return frozenset(r for r, deaths in self._deaths.items() if deaths >= MAX_DEATHS)

    @property
    def is_waiting(self) -> bool:
        """A turn is offered: nothing runs here until it is taken."""
        return self._turn is not None and not self._turn.is_taken

    @property
    def alone(self) -> str | None:
        """The request whose turn it is."""
        return self._turn.request_id if self._turn is not None and self._turn.is_taken else None

    def enter(self, request_id: str, num_deaths: int) -> None:
        """A request came, with the deaths that its gateway has seen."""
        self.forget(request_id)
        if num_deaths:
            self._deaths[request_id] = num_deaths

    def forget(self, request_id: str) -> None:
        """It is not here any more."""
        self._deaths.pop(request_id, None)
        self._hit.pop(request_id, None)
        if self._turn is not None and self._turn.request_id == request_id:
            self._turn = None

    def give_up(self, request_ids: Iterable[str]) -> None:
        """The step that these were in did not commit."""
        self._hit.update(dict.fromkeys(request_ids))

    def begin(self) -> None:
        """A generation runs: whoever died in the steps before it has been counted."""
        self._hit.clear()

    def die(self) -> str | None:
        """Another worker died; returns the request that was alone in the step, to be failed."""
        hit, self._hit = self._hit, {}
        for request_id in hit:
            self._deaths[request_id] = self._deaths.get(request_id, 0) + 1
        alone = self.alone
        return alone if alone in hit else None

    def commit(self, request_ids: Collection[str]) -> str | None:
        """A step of these committed; returns the request whose turn is over."""
        if not (self._deaths or self._hit):
            return None
        alone = self.alone
        for request_id in request_ids:
            self._deaths.pop(request_id, None)
            self._hit.pop(request_id, None)
        if alone is None or alone not in request_ids:
            return None
        self._turn = None
        return alone

    def offer(self, can_run: Callable[[str], bool], now_s: float) -> str | None:
        """The suspect whose turn is to be offered now, if any can run and it is nobody's turn."""
        if self._turn is not None:
            return None
        found = next((r for r in self._deaths if r in self.suspects and can_run(r)), None)
        if found is not None:
            self._turn = _Turn(found, now_s)
        return found

    def take(self, request_id: str) -> None:
        """The gateway has noted that its request runs alone now."""
        if self._turn is not None and self._turn.request_id == request_id:
            self._turn.is_taken = True

    def expire(self, now_s: float) -> None:
        """An offer that nobody answers does not hold up the others; it goes to the end."""
        turn = self._turn
        if turn is not None and not turn.is_taken and now_s - turn.offered_s >= ANSWER_LIMIT_S:
            self._turn = None
            self._deaths[turn.request_id] = self._deaths.pop(turn.request_id)
