"""Finds a request that crashes workers, by running suspects alone.

    two workers in a row die in a step with the request: it is a suspect and does not run
      ─▶ this worker offers a solo step to the request's gateway, which acknowledges the offer
      ─▶ the step is certain: the gateway records that the request runs alone, and acknowledges
           ─▶ one step runs, in which the cluster has no other rows
                ─▶ it commits: the request is no longer a suspect
                ─▶ a third worker dies: the request fails with an error
      ─▶ the step is over: the gateway records that, and acknowledges; others run again

If an expert worker dies, the request stays in this engine. If this worker dies, the gateway knows
from its record which request ran. To keep the record correct at all times, nothing runs on this
worker between a change and its acknowledgement. Only an offer has a time limit, and the gateway
records nothing for it. If a gateway disconnects, its requests end. Pure; times are passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from cluster.core.topology import Generation
from workers.requests.request import MAX_DEATHS, Queued, SoloStage, SoloStep

ACKNOWLEDGE_LIMIT_S = 1.0
"""Seconds to acknowledge an offer; after them, other requests run and the offer is repeated."""


@dataclass(slots=True)
class _Solo:
    """The request of a solo step."""

    request_id: str
    attempt: int
    offered_s: float
    stage: SoloStage = SoloStage.OFFERED
    is_acknowledged: bool = False
    """Whether the gateway has recorded that the step is certain, so the request may run."""

    @property
    def message(self) -> SoloStep:
        return SoloStep(request_id=self.request_id, attempt=self.attempt, stage=self.stage)


class StepMembers:
    """The members of the last generation that ran. Only these workers took part in its steps."""

    def __init__(self) -> None:
        self._names: frozenset[str] = frozenset()

    def begin_generation(self, generation: Generation) -> None:
        """Record that the steps of this generation start."""
        self._names = frozenset(m.name for m in generation.members)

    def take_dead(self, generation: Generation, drained: Collection[str]) -> frozenset[str]:
        """Return, once, the workers that the next generation lacks and that were not drained."""
        kept = self._names & {m.name for m in generation.members}
        gone, self._names = self._names - kept, kept
        return gone - frozenset(drained)


class Isolation:
    """Counts deaths of workers by request, and selects the request that runs alone."""

    def __init__(self) -> None:
        self._deaths: dict[str, int] = {}  # since the last commit of its rows
        self._hit: dict[str, None] = {}  # ids in an abandoned step, without a commit since
        self._solo: _Solo | None = None
        self._messages: list[SoloStep | Queued] = []

    @property
    def suspects(self) -> frozenset[str]:
        """Requests that must not run with others."""
        return frozenset(r for r, deaths in self._deaths.items() if deaths >= MAX_DEATHS)

    @property
    def is_waiting(self) -> bool:
        """Whether a stage of a solo step is not acknowledged, so that nothing may run."""
        return self._solo is not None and not self._solo.is_acknowledged

    @property
    def alone(self) -> str | None:
        """The request that runs alone, or None."""
        solo = self._solo
        return solo.request_id if solo is not None and solo.is_acknowledged else None

    def enter(self, request_id: str, num_deaths: int) -> None:
        """Add a request with the number of deaths that its gateway has counted."""
        self.forget(request_id)
        if num_deaths:
            self._deaths[request_id] = num_deaths

    def forget(self, request_id: str) -> None:
        """Remove a request that has ended."""
        self._deaths.pop(request_id, None)
        self._hit.pop(request_id, None)
        if self._solo is None or self._solo.request_id != request_id:
            return
        if self._solo.stage is SoloStage.OFFERED:
            self._solo = None
        else:
            self._end()

    def record_abandoned(self, request_ids: Iterable[str]) -> None:
        """Record that the step of these requests did not commit."""
        self._hit.update(dict.fromkeys(request_ids))

    def begin_generation(self) -> None:
        """Record that a generation starts: deaths in earlier steps have been counted."""
        self._hit.clear()

    def record_death(self) -> str | None:
        """Count the death of another worker; returns the request that ran alone and must fail."""
        hit, self._hit = self._hit, {}
        for request_id in hit:
            self._deaths[request_id] = self._deaths.get(request_id, 0) + 1
        alone = self.alone
        return alone if alone in hit else None

    def commit(self, request_ids: Collection[str]) -> None:
        """Record that the step of these requests committed."""
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

        ``can_run``: whether a request could run now. ``attempt``: returns its attempt number. The
        request of a withdrawn offer is queued again, and other suspects get the next offer.
        """
        solo = self._solo
        if solo is None:
            name = next((r for r in self._deaths if r in self.suspects and can_run(r)), None)
            if name is not None:
                self._solo = _Solo(name, attempt(name), now_s)
                self._messages.append(self._solo.message)
        elif solo.stage is SoloStage.OFFERED and now_s - solo.offered_s >= ACKNOWLEDGE_LIMIT_S:
            self._solo = None
            self._deaths[solo.request_id] = self._deaths.pop(solo.request_id)
            self._messages.append(Queued(request_id=solo.request_id, attempt=solo.attempt))
        messages, self._messages = self._messages, []
        return messages

    def acknowledge(self, solo_step: SoloStep) -> None:
        """Record that a gateway has received and recorded this stage of a solo step."""
        solo = self._solo
        if solo is None or solo_step != solo.message:
            return  # the offer was withdrawn
        if solo.stage is SoloStage.OFFERED:
            solo.stage = SoloStage.CERTAIN
            self._messages.append(solo.message)
        elif solo.stage is SoloStage.CERTAIN:
            solo.is_acknowledged = True
        else:
            self._solo = None

    def drop_solo_step(self) -> None:
        """Record that the gateway of the solo step disconnected and will not acknowledge."""
        self._solo = None
        self._messages.clear()

    def _end(self) -> None:
        """End the solo step; its gateway must know before other requests run."""
        solo = self._solo
        assert solo is not None, "a solo step ends only after its offer"
        if solo.stage is not SoloStage.OVER:
            solo.stage, solo.is_acknowledged = SoloStage.OVER, False
            self._messages.append(solo.message)
