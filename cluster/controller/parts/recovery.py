"""Recovery: members leave or join, survivors load experts, new workers fill empty places.

    a member is lost ──▶ the others continue, and load the experts without a copy
        ──▶ a new worker starts in its place ──▶ it is ready ──▶ a generation with it

``decide`` (failure policy) and ``Replacements`` decide; ``Recovery`` makes the controller act.
Loading and the forming of the generation run at the same time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from cluster.controller.parts.generation_round import Phase
from cluster.controller.parts.host import ControllerHost
from cluster.controller.parts.reloads import Reload, Reloads
from cluster.controller.parts.settings import ControllerSettings
from cluster.core.frames import ExpertsLoaded
from cluster.core.placement import FREE_SLOT, ExpertPlacement
from cluster.core.states import WorkerState
from cluster.core.topology import Member
from cluster.planner.stages import SlotFill
from cluster.policy.coverage import Holdings
from cluster.policy.failure import Outcome, decide, describe_losses
from cluster.policy.replacement import Replacements

logger = logging.getLogger(__name__)

_ROOM_WAIT_S = 10.0
_MAX_RETRY_S = 60.0


class Problem(StrEnum):
    """What keeps a cluster from being whole; follows the name of a worker or a place."""

    CANNOT_LOAD = "cannot load experts"
    LEFT_OUT = "is left out"
    WAITS_FOR_ROOM = "waits for room"


class Recovery:
    """Members that leave and join. Owned by the controller; one thread, time passed in."""

    def __init__(
        self,
        host: ControllerHost,
        members: Sequence[Member],
        desired: ExpertPlacement,
        *,
        room: int | None = None,
        limits: ControllerSettings,
        first_order: int = 1,
    ) -> None:
        """``members`` and ``desired`` describe the whole cluster.

        ``room`` is the number of expert slots of a device in each bank if banks do not grow; load
        orders are numbered from ``first_order``.
        """
        self._host = host
        self._room = room
        self._limits = limits
        self._started_with: dict[str, ExpertPlacement] = {}
        self._failed: list[SlotFill] = []
        self._barred: dict[int, str] = {}
        self._retry_s = self._limits.retry_s
        self._retry_at = 0.0
        self.desired = desired
        """The placement of the whole cluster; rebalancing changes it."""
        self.replacements = Replacements(members)
        """The places of the cluster."""
        self.reloads = Reloads(first_order)
        """Load orders under way."""

    def problems(self, now: float) -> list[str]:
        """What keeps the cluster from being whole, for people."""
        names = {r.member.device: r.name for r in self._host.workers.alive()}
        found = [
            f"{names.get(device, f'device {device}')} {Problem.CANNOT_LOAD}: {error}"
            for device, error in sorted(self._barred.items())
        ]
        found += [
            f"{place} {Problem.LEFT_OUT}: {why}"
            for place, why in self.replacements.left_out.items()
        ]
        for record in self._host.workers.alive():
            waits = record.state is WorkerState.STARTING and record.name in self._started_with
            if waits and now - record.since > _ROOM_WAIT_S:
                found.append(f"{record.name} {Problem.WAITS_FOR_ROOM}")
        return found

    # ---- a restarted controller -----------------------------------------------------------

    def memory(self) -> dict[str, Any]:
        """Plain data for the next controller; ``restore`` takes it."""
        is_whole = self.desired.banks == self._host.placement.banks
        return {
            "desired": None if is_whole else self.desired.to_dict(),
            "left_out": self.replacements.left_out,
        }

    def restore(self, memory: Mapping[str, Any], now: float) -> None:
        """Continue what an earlier controller began; the table has all workers already."""
        if memory.get("desired"):
            self.desired = ExpertPlacement.from_dict(memory["desired"])
        members = {m.name for m in self._host.round.members}
        for record in self._host.workers:
            if record.state is WorkerState.DRAINED:
                self.replacements.leave(record.name)
            elif record.is_lost:
                self.replacements.lost(record.name, record.reason, now)
            elif record.name not in members:
                self._started_with[record.name] = self.desired
        self.replacements.leave_out(memory.get("left_out", {}))

    # ---- events ---------------------------------------------------------------------------

    def lost(self, reasons: Mapping[str, str], now: float) -> None:
        """Workers (name -> reason) are lost; the table has recorded it already."""
        for name, reason in reasons.items():
            self.replacements.lost(name, reason, now)
            self.reloads.drop(name)
            self._started_with.pop(name, None)
        members = self._host.round.members
        gone = {m.name: reasons[m.name] for m in members if m.name in reasons}
        others = {n: r for n, r in reasons.items() if n not in gone}
        if others:
            left_out = "; ".join(f"{n} is left out" for n in self.replacements.left_out)
            self._host.note(describe_losses(others), left_out or "start another one", now)
        if gone:
            self._host.metrics.lost([m for m in members if m.name in gone], now)
            survivors = [m for m in members if m.name not in gone]
            self._go_on(survivors, describe_losses(gone), now)

    def ready(self, now: float) -> None:
        """Workers are ready: those outside the generation join, unless one is forming."""
        if not self._host.takes_orders or self._host.round.phase is Phase.FORMING:
            return
        members = self._host.round.members
        known = {m.name for m in members}
        fresh = [
            r.member
            for r in self._host.workers.alive()
            if r.state is WorkerState.READY and r.name not in known
        ]
        if fresh:
            names = ", ".join(m.name for m in fresh)
            verb = "is" if len(fresh) == 1 else "are"
            self._go_on([*members, *fresh], f"{names} {verb} ready", now)

    def loaded(self, name: str, frame: ExpertsLoaded, now: float) -> bool:
        """A worker has answered a load order; False if no recovery sent that order."""
        reload = self.reloads.answered(name, frame.order)
        if reload is None:
            return False
        if frame.error:
            self._cannot_load(reload, frame.error, now)
        else:
            took_s, moved = now - reload.began_at, len(reload.loads)
            self._host.metrics.moved("recovery", moved, frame.num_bytes, took_s)
            self._host.run_if_ready(now)
        return True

    def moved(self, placement: ExpertPlacement) -> None:
        """A whole cluster has moved to this placement; one made by a drain is temporary."""
        rows = [bank.physical_to_logical for bank in placement.banks]
        devices = range(placement.num_devices)
        uses_all = all(any(set(row[d]) - {FREE_SLOT} for row in rows) for d in devices)
        if uses_all and self.replacements.is_full(self._host.round.members):
            self.desired = placement

    def ran(self, now: float) -> None:
        """The generation that was formed runs."""
        self.replacements.joined(self._host.round.members)
        self._host.metrics.recovered(now)
        self._barred.clear()
        self._retry_s = self._limits.retry_s
        self.ready(now)

    def tick(self, now: float) -> None:
        """Time has passed: start workers, check limits, retry."""
        if not self._host.takes_orders:
            return
        for reload in self.reloads.overdue(now, self._limits.load_limit_s):
            self.reloads.answered(reload.worker, reload.order)
            limit = f"no answer within {self._limits.load_limit_s:g} s"
            self._cannot_load(reload, limit, now)
        self._check_starting(now)
        if self._host.round.phase is not Phase.FORMING:
            self._start_workers(now)
        if self._host.round.phase is Phase.STALLED:
            if self._barred and now >= self._retry_at:
                self._try_again(now)
            self._host.settle()

    # ---- actions --------------------------------------------------------------------------

    def _go_on(self, members: Sequence[Member], cause: str, now: float) -> None:
        """Form a generation of these members, or stall."""
        host = self._host
        decision = decide(
            members,
            cause,
            self._holdings(members),
            highest_epoch=host.round.highest_epoch,
            expert_load=host.expert_load(),
        )
        if decision.outcome is not Outcome.CONTINUE:
            host.stall(decision, now)
            return
        workers = {m.device: m.name for m in members if m.holds_experts}
        for name, order in self.reloads.order(decision.loads, workers, now).items():
            host.send(name, order)
        self._failed.clear()
        for member in members:
            self._started_with.pop(member.name, None)
        host.form(decision, now)

    def _holdings(self, members: Sequence[Member]) -> Holdings:
        return Holdings(
            current=self._host.placement,
            desired=self.desired,
            joining={
                m.device: self._started_with[m.name]
                for m in members
                if m.holds_experts and m.name in self._started_with
            },
            room=self._room,
            barred=frozenset(self._barred),
            failed=tuple(self._failed),
        )

    def _cannot_load(self, reload: Reload, error: str, now: float) -> None:
        """A member failed to load its experts: other workers load them, if any can."""
        logger.warning("%s cannot load experts: %s", reload.worker, error)
        self._failed += reload.loads
        self._barred[reload.loads[0].device] = error
        self._retry_at = now + self._retry_s
        cause = f"{reload.worker} cannot load {len(reload.loads)} experts: {error}"
        self._go_on(self._host.round.members, cause, now)

    def _try_again(self, now: float) -> None:
        """A worker may be able to load by now."""
        self._retry_s = min(2 * self._retry_s, _MAX_RETRY_S)
        self._retry_at = now + self._retry_s
        self._barred.clear()
        self._go_on(self._host.round.members, "try again to load experts", now)

    def _start_workers(self, now: float) -> None:
        for member in self.replacements.take_due(now):
            self._host.workers.add(member, now)
            self._started_with[member.name] = self.desired
            self._host.start_worker(member, self.desired)

    def _check_starting(self, now: float) -> None:
        """New workers that miss their limit; those that wait for room may wait."""
        limit = self._limits.start_limit_s
        known = {m.name for m in self._host.round.members}
        late = [
            r.name
            for r in self._host.workers.alive()
            if r.name not in known and r.state is WorkerState.LOADING and now - r.since > limit
        ]
        self._host.lost(dict.fromkeys(late, f"not ready within {limit:g} s"), now)
