"""Draining: workers are emptied, leave the generation and end, and no request fails.

    COPY    other workers read the experts whose only copies are there, from memory and while steps
            run; then an epoch follows in which the others have all experts
    MOVE    the workers take no new request; the gateways continue the running ones elsewhere
    LEAVE   a generation without them runs
    END     their processes end; new workers start in their places, after the drain of a node once
            that node has left, and never where the cluster is scaled down. Where it follows its
            nodes, the drain of a node removes the places, too

Up to LEAVE a drain can be undone. ``Draining`` decides the next step; the controller acts. A
restarted controller continues the drain of an earlier one (``Memory``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.controller.parts.cluster import Cluster
from cluster.controller.parts.drain_requests import DrainRequests
from cluster.controller.parts.drains import Drain, DrainOrder, DrainStep
from cluster.controller.parts.effects import End, Release
from cluster.controller.parts.epoch_change import ChangeState, EpochChange
from cluster.controller.parts.metrics import MoveReason
from cluster.controller.parts.operations import Operation, OperationState
from cluster.controller.parts.workers import WorkerRecord
from cluster.controller.rebalance.loop import Rebalancing
from cluster.core.errors import ConflictError, UnknownNameError
from cluster.core.frames import ControlFrame, Shutdown, StatusRequest
from cluster.core.states import WorkerState
from cluster.planner.stages import Stage
from cluster.policy.coverage import describe_members, stage_on, without_devices
from cluster.policy.places import place_of

SIGNAL_LIMIT_S = 120.0
"""Limit of a drain that a worker requested after SIGTERM."""
_TOO_LATE = (DrainStep.LEAVE, DrainStep.END, DrainStep.BACK)
"""Steps in which a drain can no longer be undone, or is being undone."""


class Draining:
    """The drains of a cluster, one after the other. Owned by the controller."""

    def __init__(self, cluster: Cluster, rebalancing: Rebalancing) -> None:
        """No change of ``rebalancing`` begins or continues while a drain runs."""
        self._cluster = cluster
        self._rebalancing = rebalancing
        self._change: EpochChange | None = None
        """The change of the maps that the drain has under way."""
        self._requests = DrainRequests(follow_nodes=cluster.config.workers.follow_nodes)
        self._refusal = ""
        self._asked = 0
        """Token of the questions for numbers since the workers take no new request."""

    def restore(self, drain: Drain, now: float) -> None:
        """Continue the drain of an earlier controller; the table has all workers already.

        Copies of experts begin again; requests are held back at once if they were before.
        """
        self._cluster.drain = drain
        drain.operation = self._cluster.operations.find(drain.operation.id)
        drain.deadline = now + drain.left_s
        table = self._cluster.workers
        states = {table[n].state if n in table else WorkerState.LOST for n in drain.names}
        if states == {WorkerState.DRAINED}:
            drain.resume(DrainStep.LEAVE)
        elif states & {WorkerState.LOST, WorkerState.DRAINED}:
            text = f"{drain.workers}: lost before they had left"
            self._end(drain, OperationState.FAILED, text, now)
        elif drain.step is not DrainStep.BACK:
            self._hold_back(drain, drain.step is DrainStep.MOVE)
            drain.resume(DrainStep.SETTLE)

    def begin(self, order: DrainOrder, now: float) -> Operation:
        """Begin to drain, or find the operation that the same request began.

        Raises ``UnknownNameError`` and ``ConflictError``; nothing has changed then.
        """
        before = self._cluster.operations.asked_before(order, self._cluster.placement.epoch)
        return before or self._begin(self._named(order), order, now)

    def check_removal(self, names: Sequence[str]) -> None:
        """Raise ``ConflictError`` if the cluster cannot do without these workers, if any."""
        if names:
            self._stage_without(names)

    def remove(
        self, names: Sequence[str], operation: Operation, limit_s: float, now: float
    ) -> None:
        """Drain workers and remove their places, as the last part of an operation that runs."""
        order = DrainOrder(limit_s=limit_s)
        self._start(tuple(names), order, operation, now, removes_places=True)

    def requested(self, name: str, now: float, *, node_leaves: bool = False) -> None:
        """A worker received SIGTERM, or its node will leave (then it requests again and again)."""
        if self._cluster.drain is None or name not in self._cluster.drain.names or node_leaves:
            self._requests.add(name, now, node_leaves=node_leaves)

    def cancel(self, operation: Operation, now: float) -> None:
        """Undo a drain. Raises ``ConflictError`` if it is too late."""
        drain = self._cluster.drain
        if drain is None or drain.operation is not operation:
            raise ConflictError(f"{operation.id} has ended")
        if drain.step is DrainStep.BACK:
            raise ConflictError(f"{operation.id} is being taken back already")
        if drain.step in (DrainStep.LEAVE, DrainStep.END):
            raise ConflictError(f"{drain.workers} has left already")
        self._undo(drain, OperationState.CANCELLED, "cancelled", now)

    # ---- events ---------------------------------------------------------------------------

    def frame(self, name: str, frame: ControlFrame, now: float) -> bool:
        """A frame about a change of the placement; False if it is about another change."""
        drain = self._cluster.drain
        if drain is None or self._change is None:
            return False
        self._change.frame(name, frame, now)
        self._advance(drain, now)
        return True

    def lost(self, drain: Drain, reasons: Mapping[str, str], now: float) -> None:
        """Workers (name -> reason) are lost during a drain; the table has recorded it already."""
        gone = sorted(reasons.keys() & drain.names)
        if gone and drain.step not in _TOO_LATE:
            text = f"{gone[0]} was lost before it had left: {reasons[gone[0]]}"
            self._undo(drain, OperationState.FAILED, text, now)

    def ended(self, names: Sequence[str], now: float) -> None:
        """Processes of workers have ended."""
        drain = self._cluster.drain
        if drain is None or drain.step is not DrainStep.END or not set(drain.names) <= set(names):
            return
        operation = drain.operation
        is_scaling = operation.kind == "scale"
        operation.result["removed" if is_scaling else "workers"] = list(drain.names)
        text = f"scaled to {operation.target}" if is_scaling else f"{operation.target} is drained"
        if drain.removes_places:
            text += "" if is_scaling else ", and the cluster goes on without its place"
            self._cluster.effects.append(Release(tuple(map(place_of, drain.names))))
        elif not drain.order.node:  # a node will be taken down
            for name in drain.names:
                self._cluster.places.reopen(name)
        self._end(drain, OperationState.SUCCEEDED, text, now)

    def tick(self, now: float) -> None:
        """Time has passed: take the next step if the last one is done."""
        if self._cluster.drain is None:
            self._begin_requested(now)
        drain = self._cluster.drain
        if drain is None:
            return
        if not self._cluster.takes_orders:
            self._end(drain, OperationState.FAILED, "the cluster is ending", now)
            return
        if drain.has_less(now):
            self._cluster.remember()
        self._advance(drain, now)

    # ---- which workers ----------------------------------------------------------------------

    def _begin_requested(self, now: float) -> None:
        """Begin the next drain that workers requested."""
        if self._cluster.operations.running is not None or not self._cluster.runs:
            return
        if not self._requests.are_due(now):
            return
        names = self._requests.take({r.name for r in self._cluster.workers.alive()})
        if not names:
            return
        ready = tuple(name for name in names if self._cluster.workers[name].is_ready)
        if ready:  # the others do not hold them up
            self._requests.pause(set(names) - set(ready), now)
            names = ready
        try:
            self._begin(names, DrainOrder(limit_s=SIGNAL_LIMIT_S), now)
        except ConflictError as err:
            self._requests.pause(names, now)
            cause, effect = f"{' and '.join(names)} got a signal to end", f"go on: {err}"
            if self._refusal != cause + effect:
                self._cluster.note(cause, effect, now)
            self._refusal = cause + effect

    def _begin(self, names: tuple[str, ...], order: DrainOrder, now: float) -> Operation:
        self._cluster.operations.check_free()
        if not self._cluster.takes_orders:
            raise ConflictError("the cluster is starting or ending")
        self._stage_without(names)
        operation = self._cluster.operations.begin("drain", " and ".join(names), order, now)
        is_for_good = self._is_for_good(names, order)
        self._start(names, order, operation, now, removes_places=is_for_good)
        return operation

    def _is_for_good(self, names: Sequence[str], order: DrainOrder) -> bool:
        """Whether a drain removes the places, as the numbers of workers follow the nodes."""
        leaves = bool(order.node) or self._requests.leave_for_good(names)
        return leaves and self._cluster.config.workers.follow_nodes

    def _start(
        self,
        names: tuple[str, ...],
        order: DrainOrder,
        operation: Operation,
        now: float,
        *,
        removes_places: bool = False,
    ) -> None:
        drain = self._cluster.drain = Drain(
            operation=operation,
            names=names,
            order=order,
            deadline=now + order.limit_s,
            left_s=order.limit_s,
            removes_places=removes_places,
        )
        drain.resume(DrainStep.SETTLE)
        self._cluster.remember()
        self._advance(drain, now)

    def _named(self, order: DrainOrder) -> tuple[str, ...]:
        """The workers that an order names. Raises ``UnknownNameError`` and ``ConflictError``."""
        workers = self._cluster.workers
        if order.worker:
            if order.worker not in workers:
                raise UnknownNameError(f"there is no worker {order.worker[:64]!r}")
            return (order.worker,)
        on_node = [r for r in workers if r.member.node == order.node]
        if not on_node:
            raise UnknownNameError(f"there is no worker on a node {order.node[:64]!r}")
        names = tuple(r.name for r in on_node if not r.is_lost)
        if not names:
            raise ConflictError(f"no worker is left on {order.node}")
        return names

    def _stage_without(self, names: Sequence[str]) -> Stage | None:
        """A placement without these workers, and what the others must load for it.

        None if they hold no experts. Raises ``ConflictError`` if the cluster cannot do without
        them.
        """
        cluster = self._cluster
        for name in names:
            record = cluster.workers[name]
            if not record.is_ready:
                raise ConflictError(f"{name} is {record.state.value}")
        members = cluster.generation.members
        if not any(m.runs_attention for m in members if m.name not in names):
            last = [n for n in names if cluster.workers[n].member.runs_attention]
            if not last:
                raise ConflictError("no attention worker is left: nothing runs without it")
            more = 1 + sum(m.runs_attention for m in members)
            first = f"add another one first: expertmesh scale --attention {more}"
            raise ConflictError(f"{last[0]} is the last attention worker: {first}")
        others = {m.device for m in cluster.generation.experts if m.name not in names}
        if len(others) == len(cluster.generation.experts):
            return None
        return stage_on(others, cluster.placement, cluster.room)

    def _attention(self, drain: Drain) -> list[WorkerRecord]:
        """Those of its workers that hold requests."""
        records = (self._cluster.workers[name] for name in drain.names)
        return [r for r in records if r.member.runs_attention]

    # ---- steps ----------------------------------------------------------------------------

    def _advance(self, drain: Drain, now: float) -> None:
        """Take the next step if the last one is done; undo the drain where it cannot be taken."""
        try:
            self._take_step(drain, now)
        except ConflictError as err:
            self._undo(drain, OperationState.FAILED, str(err), now)

    def _take_step(self, drain: Drain, now: float) -> None:
        cluster = self._cluster
        if drain.step is DrainStep.SETTLE and cluster.runs and self._rebalancing.is_idle:
            self._check_again(drain, now)
        elif drain.step is DrainStep.COPY:
            self._watch_copies(drain, now)
        elif drain.step is DrainStep.MOVE:
            self._count_moved(drain)
            if cluster.runs and all(self._is_empty(r) for r in self._attention(drain)):
                self._leave(drain, now)
            else:
                cluster.send(StatusRequest(token=self._asked), *drain.names)
        elif drain.step is DrainStep.BACK:
            self._watch_return(drain, now)
        elif drain.step is DrainStep.LEAVE and cluster.runs:
            drain.operation.generation = cluster.generation.number
            self._enter(drain, DrainStep.END)
            cluster.send(Shutdown(reason="drained"), *drain.names)
            cluster.effects.append(End(drain.names))
        if cluster.drain is not drain or now <= drain.deadline or drain.step in _TOO_LATE:
            return  # in time, or the controller has limits of its own
        if not (drain.order.force and drain.step is DrainStep.MOVE):
            text = f"could not {drain.step.value} within {drain.order.limit_s:g} s"
            self._undo(drain, OperationState.FAILED, text, now)
        elif cluster.runs:
            self._leave(drain, now)

    def _check_again(self, drain: Drain, now: float) -> None:
        """Begin to copy or to move; the cluster may have changed since the order."""
        stage = self._stage_without(drain.names)
        if stage is None or not stage.fills:
            self._move(drain, now)
            return
        if drain.before is None:
            drain.before, drain.copied_in = self._cluster.placement, self._cluster.generation.number
        self._enter(drain, DrainStep.COPY)
        drain.operation.result["experts_copied"] = len(stage.fills)
        left_s = max(drain.deadline - now, 0.1)
        self._change = EpochChange(self._cluster, stage, now, limit_s=left_s)

    def _watch_copies(self, drain: Drain, now: float) -> None:
        """Continue when the others have the experts; begin again after a generation change."""
        change = self._change
        assert change is not None, "copying is a change of the placement"
        generation = self._cluster.generation.number
        change.tick(now)
        if not change.is_over:
            return
        self._change = None
        moved, took_s = len(change.stage.fills), now - change.began_at
        if change.state is ChangeState.DONE:
            reason: MoveReason = "scale" if drain.removes_places else "drain"
            self._cluster.moved(reason, moved, change.num_bytes, took_s)
            self._move(drain, now)
        elif change.generation.number != generation or not self._cluster.runs:
            self._enter(drain, DrainStep.SETTLE)
        else:
            text = f"the experts could not be copied: {change.reason}"
            self._undo(drain, OperationState.FAILED, text, now)

    def _move(self, drain: Drain, now: float) -> None:
        drain.operation.result.setdefault("requests_moved", 0)
        self._count_moved(drain)
        self._asked = next(self._cluster.order_numbers)
        self._hold_back(drain, True)
        self._enter(drain, DrainStep.MOVE)

    def _count_moved(self, drain: Drain) -> None:
        """The most that its workers had, of what they have said so far."""
        found, result = self._attention(drain), drain.operation.result
        held = sum(record.num_requests or 0 for record in found)
        result["requests_moved"] = max(result["requests_moved"], held)

    def _is_empty(self, record: WorkerRecord) -> bool:
        """By an answer to a question since it takes no new request: a heartbeat may be older."""
        return record.answered >= self._asked and record.num_requests == 0

    def _leave(self, drain: Drain, now: float) -> None:
        """Form a generation without the workers; their places wait for the end of the drain."""
        stage = self._stage_without(drain.names)  # others may have been lost meanwhile
        if stage is not None and stage.fills:
            drain.enter(DrainStep.SETTLE)  # copies were lost meanwhile
            return
        cluster, why = self._cluster, f"drained {drain.workers} ({drain.operation.id})"
        drain.removes_places |= self._is_for_good(drain.names, drain.order)
        placement = stage.placement if stage is not None else cluster.placement
        if drain.removes_places and stage is not None:
            gone = {cluster.workers[name].member.device for name in drain.names}
            cluster.desired = without_devices(gone, cluster.desired, cluster.room)
            placement = placement.up_to(cluster.desired.num_devices)
        drain.enter(DrainStep.LEAVE)
        members = [m for m in cluster.round.members if m.name not in drain.names]
        for name in drain.names:
            cluster.workers[name].enter(WorkerState.DRAINED, why)
            cluster.workers[name].operation = drain.operation.id
            cluster.places.cordon(name, drain.order.node)
            if drain.removes_places:
                cluster.places.remove([place_of(name)])
            cluster.round.drop_reports(name)
        cluster.remember()
        cluster.form(members, placement, now)
        effect = f"go on with {describe_members(members)}, placement epoch {placement.epoch}"
        cluster.note(why, effect, now)

    def _undo(self, drain: Drain, state: OperationState, text: str, now: float) -> None:
        """Take requests again, and restore the maps from before the drain if it changed them."""
        cluster = self._cluster
        self._hold_back(drain, False)
        if self._change is not None:
            self._change.cancel("the drain was given up")
        back = drain.way_back(cluster.placement, cluster.generation)
        is_whole = cluster.runs and not any(cluster.workers[n].is_lost for n in drain.names)
        if self._change is not None or back is None or not is_whole:
            self._end(drain, state, text, now)
            return
        drain.outcome = (state, text)
        if drain.step is not DrainStep.BACK:  # an earlier controller took it back
            self._enter(drain, DrainStep.BACK)
        self._change = EpochChange(cluster, back, now)

    def _watch_return(self, drain: Drain, now: float) -> None:
        """End when the old maps are in force; a new generation ends it, too."""
        assert drain.outcome is not None, "it is taken back for a reason"
        if self._change is not None:
            self._change.tick(now)
            if self._change.is_over:
                self._end(drain, *drain.outcome, now)
        elif (self._cluster.runs and self._rebalancing.is_idle) or now > drain.deadline:
            self._undo(drain, *drain.outcome, now)  # an earlier controller began it

    def _hold_back(self, drain: Drain, drains: bool) -> None:
        """Tell the gateways whether its attention workers take requests."""
        for record in self._attention(drain):
            record.drains = drains
        self._cluster.touch()

    def _enter(self, drain: Drain, step: DrainStep) -> None:
        drain.enter(step)
        self._cluster.remember()

    def _end(self, drain: Drain, state: OperationState, text: str, now: float) -> None:
        self._cluster.drain = self._change = None
        self._requests.pause(drain.names, now)
        self._cluster.operations.end(drain.operation, state, text, now)
