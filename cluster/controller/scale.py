"""Scaling: adds or removes workers while the cluster serves; no request fails.

    SETTLE  wait until a generation runs and no weights move
    START   add new places; their workers start and load in the background
    JOIN    once all new workers are ready, they join one generation; new expert workers take over
            the experts that they have loaded; then attention workers change their step groups
    then    drain surplus workers and remove their places (``Draining.remove``)

A scaling is rolled back if a new worker is lost in START (in JOIN it is replaced), at the time
limit, or if a client cancels it: new places whose workers have not served are removed, and the
other workers serve as before. ``Scaling`` decides the next step; the controller acts. A restarted
controller continues the scaling of an earlier one (``ControllerMemory``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial

from msgspec.structs import replace

from cluster.controller.cluster import Cluster
from cluster.controller.drain_removal import stage_without
from cluster.controller.draining import Draining
from cluster.controller.operation_start import start_operation
from cluster.controller.operations import Operation, OperationState
from cluster.controller.rebalancing import Rebalancing
from cluster.controller.scale_operation import Scale, ScaleCommand, ScaleStep
from cluster.core.errors import ConflictError, RequestError
from cluster.core.topology import Role, holds_experts
from cluster.planner.grow import grow
from cluster.policy.coverage import describe_pools, without_devices
from cluster.policy.places import place_of


class Scaling:
    """Carries out scale operations, one at a time. Owned by the controller."""

    def __init__(self, cluster: Cluster, rebalancing: Rebalancing, draining: Draining) -> None:
        """``draining`` drains the workers that the scaling removes."""
        self._cluster = cluster
        self._rebalancing = rebalancing
        self._draining = draining

    def restore(self, scale: Scale, now: float) -> None:
        """Continue the scaling of an earlier controller."""
        self._cluster.scale = scale
        scale.restore(self._cluster.operations, now)

    def begin(self, command: ScaleCommand, now: float) -> Operation:
        """Begin to scale, or return the operation that a command with the same id has begun.

        Raises ``RequestError`` and ``ConflictError``; the cluster is unchanged in that case.
        """
        return start_operation(command, self, self._cluster, now)

    def target(self, command: ScaleCommand) -> str:
        """Describe the pool sizes after a scale command (``OperationKind.target``)."""
        cause = f" ({command.cause})" if command.cause else ""
        return describe_pools(self._wanted(command), self._num_prefill(command)) + cause

    def prepare(self, command: ScaleCommand) -> Callable[[Operation, float], None]:
        """Check a scale command; return its first step (``OperationKind.prepare``)."""
        if leaving := self._leaving(self._wanted(command)):
            stage_without(leaving, self._cluster)
        return partial(self._start, command)

    def _start(self, command: ScaleCommand, operation: Operation, now: float) -> None:
        limit_s, before = command.limit_s, self._cluster.places.num_prefill
        if before and (attention := self._wanted_attention(command)) is not None:
            prefill = self._num_prefill(command)  # from now on, sizes do not depend on the state
            sizes = {"attention": None, "prefill": prefill, "decode": attention - prefill}
            command = replace(command, **sizes)
        scale = self._cluster.scale = Scale(
            operation=operation,
            command=command,
            deadline=now + limit_s,
            left_s=limit_s,
            prefill_before=before,
        )
        scale.resume(ScaleStep.SETTLE)
        self._cluster.send_snapshot()

    def cancel(self, operation: Operation, now: float) -> None:
        """Roll back the scaling of ``operation``. Raises ``ConflictError`` if it is too late."""
        scale = self._cluster.scale
        if scale is not None and scale.operation is operation:
            if self._all_serve(scale):
                raise ConflictError(f"{operation.target}: the new workers serve already")
            scale.outcome = scale.outcome or (OperationState.CANCELLED, "cancelled")
        else:
            self._draining.cancel(operation, now)

    def lost(self, scale: Scale, reasons: Mapping[str, str]) -> None:
        """Handle lost workers (name -> reason), which the worker table has already recorded."""
        if scale.step is ScaleStep.JOIN:  # others may already serve
            return
        gone = sorted(reasons.keys() & self._cluster.new_workers)
        if gone:
            text = f"{gone[0]} was lost before it served: {reasons[gone[0]]}"
            scale.outcome = scale.outcome or (OperationState.FAILED, text)

    def tick(self, scale: Scale, now: float) -> dict[str, str]:
        """Take the next step of the scaling if its current step is done.

        Returns workers (name -> reason) to end, because the scaling has removed their places.
        """
        cluster = self._cluster
        if not cluster.can_accept_operations:
            return self._give_up(scale, OperationState.FAILED, "the cluster is ending", now)
        if self._all_serve(scale):
            return self._finish(scale, now)
        if scale.outcome is not None:
            return self._give_up(scale, *scale.outcome, now)
        if now > scale.deadline:
            what = " and ".join(cluster.unready_workers()) or "the cluster"
            text = f"{what} could not {scale.step.value} within {scale.command.limit_s:g} s"
            return self._give_up(scale, OperationState.FAILED, text, now)
        if scale.note_time_left(now):
            cluster.send_snapshot()
        if scale.step is ScaleStep.SETTLE and cluster.runs and self._rebalancing.is_idle:
            self._add_places(scale)
        elif scale.step is ScaleStep.START and not cluster.unready_workers():
            self._set_roles(self._num_prefill(scale.command))
            self._enter(scale, ScaleStep.JOIN)
        elif scale.step is ScaleStep.JOIN and cluster.unready_workers():
            self._enter(scale, ScaleStep.START)
        return {}

    # ---- how many -----------------------------------------------------------------------------

    def _wanted(self, command: ScaleCommand) -> dict[Role, int]:
        """Return the pool sizes that a command requests.

        Raises ``RequestError`` for invalid sizes, and ``ConflictError`` in local mode.
        """
        cluster, pools = self._cluster, self._cluster.places.pools()
        if cluster.config.workers.mode == "local":
            raise ConflictError("one worker holds everything (--mode local): it cannot be scaled")
        counts = (command.attention, command.expert, command.prefill, command.decode)
        if all(count is None for count in counts):
            rule = "one of attention, expert, prefill and decode is required"
            raise RequestError(rule, "attention")
        attention = self._wanted_attention(command)
        wanted = dict(pools)
        if "colocated" in pools:
            if command.attention not in (None, command.expert):
                rule = "must be left out or equal expert in colocated mode"
                raise RequestError(f"attention ({command.attention}) {rule}", "attention")
            asked: dict[Role, int | None] = {"colocated": command.expert}
        else:
            asked = {"attention": attention, "expert": command.expert}
        most = min((b.num_experts for b in cluster.desired.banks), default=0)
        for role, count in asked.items():
            field = "attention" if role == "attention" else "expert"
            if count is not None and count < 1:
                raise RequestError(f"{field} ({count}) must be at least 1", field)
            if count is not None and holds_experts(role) and count > most:
                rule = f"must not exceed the {most} experts of a bank"
                raise RequestError(f"{field} ({count}) {rule}", field)
            wanted[role] = pools[role] if count is None else count
        if wanted.get("expert") != pools.get("expert") and cluster.places.have_own_experts:
            rule = "must be left out if step groups have expert workers of their own"
            raise RequestError(f"expert ({command.expert}) {rule}", "expert")
        return wanted

    def _num_prefill(self, command: ScaleCommand) -> int:
        """Return the number of prefill workers after a command; 0 without step groups."""
        now = self._cluster.places.num_prefill
        return now if command.prefill is None else command.prefill

    def _wanted_attention(self, command: ScaleCommand) -> int | None:
        """Return the number of attention workers that a command requests; None for no change.

        Raises ``RequestError`` for sizes of step groups that are not possible.
        """
        places = self._cluster.places
        before, prefill = places.num_prefill, self._num_prefill(command)
        for field in ("prefill", "decode"):
            count = getattr(command, field)
            if count is not None and not before:
                rule = "needs a cluster that was started with num_prefill_workers"
                raise RequestError(f"{field} ({count}) {rule}", field)
            if count is not None and count < 1:
                raise RequestError(f"{field} ({count}) must be at least 1", field)
        if command.prefill is None and command.decode is None:
            if command.attention is not None and 0 < before >= command.attention:
                rule = f"must exceed the {before} prefill workers, as the others decode"
                raise RequestError(f"attention ({command.attention}) {rule}", "attention")
            return command.attention
        if command.attention is not None:
            rule = "must be left out with prefill and decode"
            raise RequestError(f"attention ({command.attention}) {rule}", "attention")
        decode = command.decode
        return prefill + (places.pools()["attention"] - before if decode is None else decode)

    def _going(self, wanted: Mapping[Role, int]) -> list[str]:
        """Return the names of the places to remove, so that the pools shrink to ``wanted``."""
        places = self._cluster.places
        return [name for role, count in wanted.items() for name in places.to_remove(role, count)]

    def _leaving(self, wanted: Mapping[Role, int]) -> list[str]:
        """Return the ready workers whose places must go, so that the pools shrink to ``wanted``."""
        workers = self._cluster.workers
        newest = self._cluster.places.workers_of(self._going(wanted))
        return sorted(n for n in newest if n in workers and workers[n].is_ready)

    # ---- steps ----------------------------------------------------------------------------

    def _all_serve(self, scale: Scale) -> bool:
        """Return whether all new workers are in a generation that runs."""
        cluster = self._cluster
        is_joined = cluster.runs and not cluster.new_workers
        has_roles = not cluster.membership.has_new_groups
        return scale.step is ScaleStep.JOIN and is_joined and has_roles

    def _add_places(self, scale: Scale) -> None:
        """Add places for the new workers, which the next tick of recovery starts."""
        cluster, places = self._cluster, self._cluster.places
        wanted = self._wanted(scale.command)
        scale.added = tuple(
            name for role, count in wanted.items() for name in places.to_add(role, count)
        )
        before = places.devices()
        places.add(scale.added)
        if devices := places.devices() - before:
            scale.before = cluster.desired
            load = cluster.load.totals()
            counts = {key: load.counts(key).tolist() for key in load.prefill}
            num_slots = cluster.num_slots - cluster.config.workers.recovery_slots
            cluster.membership.desired = grow(cluster.desired, devices, counts, num_slots)
        self._enter(scale, ScaleStep.START)

    def _finish(self, scale: Scale, now: float) -> dict[str, str]:
        """Remove surplus places and drain their workers, once all new workers serve.

        Returns workers (name -> reason) of removed places that have not served yet and must end.
        """
        cluster, operation = self._cluster, scale.operation
        operation.result["added"] = sorted(cluster.places.workers_of(scale.added))
        operation.generation = cluster.generation.number
        self._count_moves(scale, now)
        cluster.scale = None
        cluster.send_snapshot()
        if scale.outcome is not None:  # cancelled at the last moment: no worker leaves
            self._set_roles(scale.prefill_before)
            cluster.operations.end(operation, *scale.outcome, now)
            return {}
        wanted = self._wanted(scale.command)
        leaving = self._leaving(wanted)
        try:
            if leaving:
                stage_without(leaving, cluster)
        except ConflictError as err:
            cluster.operations.end(operation, OperationState.FAILED, str(err), now)
            return {}
        places = set(self._going(wanted)) - {place_of(name) for name in leaving}
        ended = self._remove(places, "the cluster is scaled down")
        self._set_roles(self._num_prefill(scale.command))
        if leaving:
            self._draining.remove(leaving, operation, scale.command.limit_s, now)
        else:
            text = f"scaled to {operation.target}"
            cluster.operations.end(operation, OperationState.SUCCEEDED, text, now)
        return ended

    def _count_moves(self, scale: Scale, now: float) -> None:
        """Count the experts that new workers have loaded as moved, in the metrics."""
        table = self._cluster.workers
        added = self._cluster.places.workers_of(scale.added)
        holders = [r for n in added if n in table and (r := table[n]).member.holds_experts]
        if not holders:
            return
        devices = {r.member.device for r in holders}
        copies = (c for bank in self._cluster.placement.banks for c in bank.copies())
        num_slots = sum(device in devices for device, _, _ in copies)
        took_s = scale.command.limit_s - (scale.deadline - now)
        num_bytes = sum(r.loaded_bytes for r in holders)
        self._cluster.moved("scale", num_slots, num_bytes, took_s)

    def _give_up(
        self, scale: Scale, state: OperationState, text: str, now: float
    ) -> dict[str, str]:
        """Roll back the scaling: remove new places whose workers have not served.

        Returns the workers (name -> reason) of these places, which must end.
        """
        cluster = self._cluster
        new = [place for place in scale.added if cluster.places.is_new(place)]
        if scale.before is not None and len(new) == len(scale.added):
            cluster.membership.desired = scale.before
        cluster.scale = None
        ended = self._remove(new, f"the scaling was rolled back: {text}")
        self._set_roles(scale.prefill_before)
        cluster.operations.end(scale.operation, state, text, now)
        return ended

    def _remove(self, places: Collection[str], why: str) -> dict[str, str]:
        """Remove places without a serving worker; return their workers to end (name -> reason)."""
        cluster = self._cluster
        newest = cluster.places.workers_of(places)
        before = cluster.places.devices()
        cluster.remove_places(places)
        gone = before - cluster.places.devices()
        if gone & set(range(cluster.desired.num_devices)):
            with suppress(ConflictError):  # no free slots: the next generation decides
                cluster.membership.desired = without_devices(gone, cluster.desired, cluster.room)
        return {n: why for n in newest if n in cluster.workers and not cluster.workers[n].is_lost}

    def _set_roles(self, num_prefill: int) -> None:
        """Set the sizes of the step groups, from the next generation on."""
        if num_prefill:
            self._cluster.membership.set_roles(num_prefill)
            self._cluster.send_snapshot()

    def _enter(self, scale: Scale, step: ScaleStep) -> None:
        scale.enter(step)
        self._cluster.send_snapshot()
