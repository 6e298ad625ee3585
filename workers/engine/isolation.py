"""Finds the request that kills workers: requests whose steps lost a worker later run alone.

    two deaths with it in the step, none of its rows committed between: a suspect, held back
      ─▶ a solo step is offered to its gateway, which acknowledges that it hears of it
      ─▶ the step is certain: the gateway records that the request runs alone, and acknowledges
           ─▶ one step alone, cluster-wide
                ─▶ it commits: cleared
                ─▶ a third worker dies: it is failed by name
      ─▶ the step is over: the gateway records that, and acknowledges; others run again

When an expert worker dies, the request stays here; when this worker dies, the gateway knows from
its record which request ran. So that the record is right at any time, nothing runs here between a
change and its acknowledgement. Only an offer has a time limit, and the gateway records nothing for
it. A gateway that goes away takes its request with it. Pure; the time is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from cluster.core.topology import Generation
from workers.requests.request import MAX_DEATHS, Queued, SoloStage, SoloStep

ANSWER_LIMIT_S = 1.0
"""Time that a gateway has to answer an offer; then other requests run, and it is repeated."""


@dataclass(slots=True)
class _Solo:
    """The request of a solo step."""

    request_id: str
    attempt: int
    offered_s: float
    stage: SoloStage = SoloStage.OFFERED
    is_acknowledged: bool = False
    """The gateway has recorded that the step is certain: it may run."""

    @property
    def message(self) -> SoloStep:
        return SoloStep(request_id=self.request_id, attempt=self.attempt, stage=self.stage)


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
        self._solo: _Solo | None = None
        self._messages: list[SoloStep | Queued] = []

    @property
    def suspects(self) -> frozenset[str]:
        """Requests that must not run with others."""
        return frozenset(r for r, deaths in self._deaths.items() if deaths >= MAX_DEATHS)

    @property
    def is_waiting(self) -> bool:
        """Nothing runs here until a gateway acknowledges a stage of a solo step."""
        return self._solo is not None and not self._solo.is_acknowledged

    @property
    def alone(self) -> str | None:
        """The request that runs alone."""
        solo = self._solo
        return solo.request_id if solo is not None and solo.is_acknowledged else None

    def enter(self, request_id: str, num_deaths: int) -> None:
        """A request was received, with the deaths that its gateway has counted."""
        self.forget(request_id)
        if num_deaths:
            self._deaths[request_id] = num_deaths

    def forget(self, request_id: str) -> None:
        """The request has ended here."""
        self._deaths.pop(request_id, None)
        self._hit.pop(request_id, None)
        if self._solo is None or self._solo.request_id != request_id:
            return
        if self._solo.stage is SoloStage.OFFERED:
            self._solo = None
        else:
            self._end()

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

    def commit(self, request_ids: Collection[str]) -> None:
        """The step of these requests committed."""
        if not (self._deaths or self._hit):
            return
        alone = self.alone
        for request_id in request_ids:
            self._deaths.pop(request_id, None)
            self._hit.pop(request_id, None)
        if alone is not None and alone in request_ids:
            self._end()

    def advance(
        self, can_run: Callable[[str], bool], attempt: Callable[[str], int], now_s: float
    ) -> list[SoloStep | Queued]:
        """Withdraw an offer that is too old, or make one; returns the new messages to gateways.

        ``can_run``: whether a request could run now. ``attempt``: of a request that is here. The
        request of an offer that was withdrawn is queued again, and has the next offer after others.
        """
        solo = self._solo
        if solo is None:
            name = next((r for r in self._deaths if r in self.suspects and can_run(r)), None)
            if name is not None:
                self._solo = _Solo(name, attempt(name), now_s)
                self._messages.append(self._solo.message)
        elif solo.stage is SoloStage.OFFERED and now_s - solo.offered_s >= ANSWER_LIMIT_S:
            self._solo = None
            self._deaths[solo.request_id] = self._deaths.pop(solo.request_id)
            self._messages.append(Queued(request_id=solo.request_id, attempt=solo.attempt))
        messages, self._messages = self._messages, []
        return messages

    def acknowledge(self, solo_step: SoloStep) -> None:
        """A gateway has received this stage of a solo step, and recorded it."""
        solo = self._solo
        if solo is None or solo_step != solo.message:
            return  # of an offer that was withdrawn
        if solo.stage is SoloStage.OFFERED:
            solo.stage = SoloStage.CERTAIN
            self._messages.append(solo.message)
        elif solo.stage is SoloStage.CERTAIN:
            solo.is_acknowledged = True
        else:
            self._solo = None

    def disconnect(self) -> None:
        """The gateway of the solo step has gone: it acknowledges nothing more."""
        self._solo = None
        self._messages.clear()

    def _end(self) -> None:
        """The solo step is over, and its gateway must know before others run."""
        solo = self._solo
        assert solo is not None, "a step that is over was offered"
        if solo.stage is not SoloStage.OVER:
            solo.stage, solo.is_acknowledged = SoloStage.OVER, False
            self._messages.append(solo.message)
