"""Finds the request that kills workers: requests whose steps lost a worker later run alone.

    two deaths with it in the step, none of its rows committed between: a suspect, held back
      ─▶ a solo step is offered to its gateway, which records the offer and answers
      ─▶ one step alone, cluster-wide
           ─▶ it commits: cleared
           ─▶ a third worker dies: it is failed by name

When an expert worker dies, the request stays here; when this worker dies, the gateway knows from
the accepted offer which request ran. Pure; the time is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from cluster.core.topology import Generation
from workers.requests.request import MAX_DEATHS

ANSWER_LIMIT_S = 1.0
"""Time that a gateway has to accept an offer; then other requests run, and it is repeated."""


@dataclass(slots=True)
class _Offer:
    request_id: str
    offered_s: float
    is_taken: bool = False


class StepMembers:
    """The members of the last generation that ran: no step ran with other workers."""

    def __init__(self) -> None:
        self._names: frozenset[str] = frozenset()

    def run(self, generation: Generation) -> None:
        """Steps of this generation run from now on."""
        self._names = frozenset(m.name for m in generation.members)

    def died(self, generation: Generation, drained: Collection[str]) -> frozenset[str]:
        """Workers that are missing in the next generation and were not drained. Each once."""
        kept = self._names & {m.name for m in generation.members}
        gone, self._names = self._names - kept, kept
        return gone - frozenset(drained)


class Isolation:
    """Deaths by request, and which request runs alone."""

    def __init__(self) -> None:
        self._deaths: dict[str, int] = {}  # since the last commit of its rows
        self._hit: dict[str, None] = {}  # in a step that was given up, not committed since
        self._offer: _Offer | None = None

    @property
    def suspects(self) -> frozenset[str]:
        """Requests that must not run with others."""
        return frozenset(r for r, deaths in self._deaths.items() if deaths >= MAX_DEATHS)

    @property
    def is_waiting(self) -> bool:
        """A solo step is offered: nothing runs here until the gateway accepts."""
        return self._offer is not None and not self._offer.is_taken

    @property
    def alone(self) -> str | None:
        """The request that runs alone."""
        return self._offer.request_id if self._offer is not None and self._offer.is_taken else None

    def enter(self, request_id: str, num_deaths: int) -> None:
        """A request was received, with the deaths that its gateway has counted."""
        self.forget(request_id)
        if num_deaths:
            self._deaths[request_id] = num_deaths

    def forget(self, request_id: str) -> None:
        """The request has ended here."""
        self._deaths.pop(request_id, None)
        self._hit.pop(request_id, None)
        if self._offer is not None and self._offer.request_id == request_id:
            self._offer = None

    def give_up(self, request_ids: Iterable[str]) -> None:
        """The step of these requests did not commit."""
        self._hit.update(dict.fromkeys(request_ids))

    def begin(self) -> None:
        """A generation runs: deaths in the steps before it have been counted."""
        self._hit.clear()

    def die(self) -> str | None:
        """Another worker died; returns the request that was alone in the step, to be failed."""
        hit, self._hit = self._hit, {}
        for request_id in hit:
            self._deaths[request_id] = self._deaths.get(request_id, 0) + 1
        alone = self.alone
        return alone if alone in hit else None

    def commit(self, request_ids: Collection[str]) -> str | None:
        """The step of these requests committed; returns the request that ran alone in it."""
        if not (self._deaths or self._hit):
            return None
        alone = self.alone
        for request_id in request_ids:
            self._deaths.pop(request_id, None)
            self._hit.pop(request_id, None)
        if alone is None or alone not in request_ids:
            return None
        self._offer = None
        return alone

    def offer(self, can_run: Callable[[str], bool], now_s: float) -> str | None:
        """The suspect to offer a solo step now, if one can run and no offer is open."""
        if self._offer is not None:
            return None
        found = next((r for r in self._deaths if r in self.suspects and can_run(r)), None)
        if found is not None:
            self._offer = _Offer(found, now_s)
        return found

    def take(self, request_id: str) -> None:
        """The gateway has recorded that its request runs alone now."""
        if self._offer is not None and self._offer.request_id == request_id:
            self._offer.is_taken = True

    def expire(self, now_s: float) -> str | None:
        """Withdraw an offer without an answer; its request has the next offer after the others.

        Returns the request: its gateway may answer yet, and must not take it for one that runs
        alone.
        """
        offer = self._offer
        if offer is not None and not offer.is_taken and now_s - offer.offered_s >= ANSWER_LIMIT_S:
            self._offer = None
            self._deaths[offer.request_id] = self._deaths.pop(offer.request_id)
            return offer.request_id
        return None
