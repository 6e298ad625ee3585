"""Finds a request that crashes workers, by running suspects alone.

    two workers in a row die in a step with the request: it is a suspect and does not run
      ─▶ this worker offers a solo step to the request's gateway, which acknowledges the offer
      ─▶ the step is certain: the gateway records that the request runs alone, and acknowledges
           ─▶ one step runs, in which the step group has no other rows
                ─▶ it commits: the request is no longer a suspect
                ─▶ a third worker dies: the request fails with an error
      ─▶ the step is over: the gateway records that, and acknowledges; others run again

If an expert worker dies, the request stays in this engine. If this worker dies, the gateway knows
from its record which request ran. To keep the record correct at all times, nothing runs on this
worker between a change and its acknowledgement. Only an offer has a time limit, and the gateway
records nothing for it. If a gateway disconnects, its requests end. Gateways move suspects of the
decode group to the prefill group, so that one step group runs solo steps. Pure; times are passed
in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from cluster.core.topology import Generation
from workers.requests.request import MAX_DEATHS, Queued, SoloStage, SoloStep

ACKNOWLEDGE_LIMIT_S = 1.0
"""Seconds in which a gateway must acknowledge the offer of a solo step (rows of only one request).
Afterwards the worker withdraws the offer, and other requests can run before the next offer."""


@dataclass(slots=True)
class _Solo:
    """State of a solo step (a step with rows of only one request) that was offered to a gateway."""

    request_id: str
    attempt: int
    offered_s: float
    stage: SoloStage = SoloStage.OFFERED
    is_acknowledged: bool = False
    """Whether the gateway has acknowledged that the step is certain; then the request may run."""

    @property
    def message(self) -> SoloStep:
        return SoloStep(request_id=self.request_id, attempt=self.attempt, stage=self.stage)


class StepMembers:
    """Names of the workers with which a worker ran steps in the last generation, to find which of
    them died."""

    def __init__(self) -> None:
        self._names: frozenset[str] = frozenset()

    def begin_generation(self, generation: Generation, name: str) -> None:
        """Record that the steps of this generation start on worker ``name``.

        The attention workers of other step groups run no steps with an attention worker.
        """
        groups = [frozenset(m.name for m in ranks) for ranks in generation.groups]
        own = next((names for names in groups if name in names), None)
        others = frozenset[str]().union(*groups) - own if own is not None else frozenset()
        self._names = frozenset(m.name for m in generation.members) - others

    def take_dead(self, generation: Generation, drained: Collection[str]) -> frozenset[str]:
        """Return the workers that died: they are not in ``generation`` and were not drained.

        Each dead worker is returned once.
        """
        kept = self._names & {m.name for m in generation.members}
        gone, self._names = self._names - kept, kept
        return gone - frozenset(drained)


class Isolation:
    """Counts the deaths of workers by request, and selects the suspect that runs alone.

    A request becomes a suspect of crashes after ``MAX_DEATHS`` deaths without a commit.
    """

    def __init__(self) -> None:
        self._deaths: dict[str, int] = {}  # since the last commit of its rows
        self._hit: dict[str, None] = {}  # ids in an abandoned step, without a commit since
        self._solo: _Solo | None = None
        self._messages: list[SoloStep | Queued] = []

    @property
    def suspects(self) -> frozenset[str]:
        """Ids of requests that must not run together with other requests, as workers died twice in
        a step with them."""
        return frozenset(r for r, deaths in self._deaths.items() if deaths >= MAX_DEATHS)

    @property
    def is_waiting(self) -> bool:
        """Whether a gateway has yet to acknowledge a stage of a solo step; no request may run until
        then."""
        return self._solo is not None and not self._solo.is_acknowledged

    @property
    def alone(self) -> str | None:
        """Id of the request that must run alone in the next step; None if no request must."""
        solo = self._solo
        return solo.request_id if solo is not None and solo.is_acknowledged else None

    def enter(self, request_id: str, num_deaths: int) -> None:
        """Add a request. ``num_deaths``: worker deaths with it that its gateway has counted."""
        self.forget(request_id)
        if num_deaths:
            self._deaths[request_id] = num_deaths

    def forget(self, request_id: str) -> None:
        """Remove a request that has ended, and end its solo step."""
        self._deaths.pop(request_id, None)
        self._hit.pop(request_id, None)
        if self._solo is None or self._solo.request_id != request_id:
            return
        if self._solo.stage is SoloStage.OFFERED:
            self._solo = None
        else:
            self._end()

    def record_abandoned(self, request_ids: Iterable[str]) -> None:
        """Record that a step with rows of these requests failed before its commit."""
        self._hit.update(dict.fromkeys(request_ids))

    def begin_generation(self) -> None:
        """Record that a new generation starts, after all deaths in earlier steps were counted."""
        self._hit.clear()

    def record_death(self) -> str | None:
        """Count the death of another worker for all requests of the step that it interrupted.

        Returns the id of the request that ran alone in this step, which must fail, or None.
        """
        hit, self._hit = self._hit, {}
        for request_id in hit:
            self._deaths[request_id] = self._deaths.get(request_id, 0) + 1
        alone = self.alone
        return alone if alone in hit else None

    def commit(self, request_ids: Collection[str]) -> None:
        """Record that a step with rows of these requests committed: they are not suspects now."""
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
        """Offer a solo step to a suspect's gateway, or withdraw an offer that is too old.

        Returns the new messages to gateways. ``can_run``: returns whether a request could run now.
        ``attempt``: returns a request's attempt number. A suspect whose offer was withdrawn comes
        after the other suspects.
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
        """Record a gateway's acknowledgement of a stage of a solo step.

        It is ignored if the offer was withdrawn.
        """
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
        """End the solo step. Other requests run only after its gateway has acknowledged the end."""
        solo = self._solo
        assert solo is not None, "a solo step ends only after its offer"
        if solo.stage is not SoloStage.OVER:
            solo.stage, solo.is_acknowledged = SoloStage.OVER, False
            self._messages.append(solo.message)
