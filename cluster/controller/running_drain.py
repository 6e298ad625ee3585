"""One drain: its steps and its rollback.

    COPY    while steps run, other workers copy the experts that only the drained workers hold; the
            next epoch uses the copies
    MOVE    the drained workers take no new requests; the gateways move the running requests to
            other workers
    LEAVE   a generation without the drained workers runs
    END     their processes end. New workers start in their places, after the drain of a node once
            that node has left. Places are removed instead if the cluster is scaled down, or
            if the cluster follows its nodes and a node is drained

Before LEAVE a drain can be rolled back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.controller.cluster import Cluster
from cluster.controller.drain_operation import Drain, DrainStep
from cluster.controller.drain_removal import stage_without
from cluster.controller.drain_requests import DrainRequests
from cluster.controller.effects import EndWorkers, ReleasePlaces
from cluster.controller.epoch_change import ChangeState, EpochChange
from cluster.controller.metrics import MoveReason
from cluster.controller.operations import OperationState
from cluster.controller.rebalancing import Rebalancing
from cluster.controller.workers import WorkerRecord
from cluster.core.errors import ConflictError
from cluster.core.frames import ControlFrame, Shutdown, StatusRequest
from cluster.core.states import WorkerState
from cluster.policy.coverage import describe_members, without_devices
from cluster.policy.places import place_of

_TOO_LATE = (DrainStep.LEAVE, DrainStep.END, DrainStep.BACK)
"""Steps in which a drain can no longer be rolled back, or is already being rolled back."""


class RunningDrain:
    """Decides and carries out the next step of one drain. Owned by ``Draining``."""

    def __init__(
        self, record: Drain, cluster: Cluster, rebalancing: Rebalancing, requests: DrainRequests
    ) -> None:
        """``record``: the state of the drain, which a restarted controller gets."""
        self.record = cluster.drain = record
        self._cluster = cluster
        self._rebalancing = rebalancing
        self._requests = requests
        self._change: EpochChange | None = None
        """The placement change that the drain is making; None if it makes none."""
        self._asked = 0
        """Token of the status request sent after the drained workers stopped taking requests."""

    @property
    def is_over(self) -> bool:
        """Whether the drain succeeded, failed or was cancelled."""
        return self._cluster.drain is not self.record

    def restore(self, now: float) -> None:
        """Continue the drain of an earlier controller.

        The copies of experts begin again. If the drain was in the step MOVE, its workers still take
        no new requests.
        """
        drain, table = self.record, self._cluster.workers
        states = {table[n].state if n in table else WorkerState.LOST for n in drain.names}
        if states == {WorkerState.DRAINED}:
            drain.resume(DrainStep.LEAVE)
        elif states & {WorkerState.LOST, WorkerState.DRAINED}:
            text = f"{drain.workers}: lost before they had left"
            self._end(OperationState.FAILED, text, now)
        elif drain.step is not DrainStep.BACK:
            self._hold_back(drain.step is DrainStep.MOVE)
            drain.resume(DrainStep.SETTLE)

    def cancel(self, now: float) -> None:
        """Roll back the drain. Raises ``ConflictError`` if it is too late."""
        drain = self.record
        if drain.step is DrainStep.BACK:
            raise ConflictError(f"{drain.operation.id} is already being rolled back")
        if drain.step in _TOO_LATE:
            raise ConflictError(f"{drain.workers} has already left")
        if self._switches:
            raise ConflictError(f"{drain.operation.id} is switching epochs: try again")
        self._undo(OperationState.CANCELLED, "cancelled", now)

    # ---- events ---------------------------------------------------------------------------

    def frame(self, name: str, frame: ControlFrame, now: float) -> bool:
        """Handle a worker's frame about a placement change.

        Returns False if the drain makes no placement change now.
        """
        if self._change is None:
            return False
        self._change.frame(name, frame, now)
        self.advance(now)
        return True

    def lost(self, reasons: Mapping[str, str], now: float) -> None:
        """Handle lost workers (name -> reason), which the worker table has already recorded."""
        drain = self.record
        gone = sorted(reasons.keys() & drain.names)
        if gone and drain.step not in _TOO_LATE:
            text = f"{gone[0]} was lost before it had left: {reasons[gone[0]]}"
            self._undo(OperationState.FAILED, text, now)

    def ended(self, names: Sequence[str], now: float) -> None:
        """Handle the end of the processes of the workers ``names``, which completes the drain."""
        drain = self.record
        if drain.step is not DrainStep.END or not set(drain.names) <= set(names):
            return
        operation = drain.operation
        is_scaling = operation.kind == "scale"
        operation.result["removed" if is_scaling else "workers"] = list(drain.names)
        text = f"scaled to {operation.target}" if is_scaling else f"{operation.target} is drained"
        if drain.removes_places:
            text += "" if is_scaling else ", and the cluster continues without its place"
            self._cluster.effects.append(ReleasePlaces(tuple(map(place_of, drain.names))))
        elif not drain.command.node:  # a drained node is taken down
            for name in drain.names:
                self._cluster.places.reopen(name)
        self._end(OperationState.SUCCEEDED, text, now)

    def tick(self, now: float) -> None:
        """Check the time limit of the drain, and take its next step if the current step is done."""
        if not self._cluster.can_accept_operations:
            self._end(OperationState.FAILED, "the cluster is ending", now)
            return
        if self.record.note_time_left(now):
            self._cluster.send_snapshot()
        self.advance(now)

    def advance(self, now: float) -> None:
        """Take the drain's next step if the current step is done; roll back if it is impossible."""
        try:
            self._take_step(now)
        except ConflictError as err:
            self._undo(OperationState.FAILED, str(err), now)

    # ---- steps ----------------------------------------------------------------------------

    def _take_step(self, now: float) -> None:
        drain, cluster = self.record, self._cluster
        if drain.step is DrainStep.SETTLE and cluster.runs and self._rebalancing.is_idle:
            self._check_again(now)
        elif drain.step is DrainStep.COPY:
            self._watch_copies(now)
        elif drain.step is DrainStep.MOVE:
            self._count_moved()
            if cluster.runs and all(self._is_empty(r) for r in self._attention()):
                self._leave(now)
            else:
                cluster.send(StatusRequest(token=self._asked), *drain.names)
        elif drain.step is DrainStep.BACK:
            self._watch_return(now)
        elif drain.step is DrainStep.LEAVE and cluster.runs:
            drain.operation.generation = cluster.generation.number
            self._enter(DrainStep.END)
            cluster.send(Shutdown(reason="drained"), *drain.names)
            cluster.effects.append(EndWorkers(drain.names))
        is_timed = drain.step not in _TOO_LATE and not self._switches
        if self.is_over or now <= drain.deadline or not is_timed:
            return  # in time, or in a step with its own limits
        if not (drain.command.force and drain.step is DrainStep.MOVE):
            text = f"could not {drain.step.value} within {drain.command.limit_s:g} s"
            self._undo(OperationState.FAILED, text, now)
        elif cluster.runs:
            self._leave(now)

    def _check_again(self, now: float) -> None:
        """Begin the step COPY, or MOVE if no expert must be copied.

        First checks again whether the workers can leave, because the cluster may have changed.
        """
        drain, cluster = self.record, self._cluster
        stage = stage_without(drain.names, cluster)
        if stage is None or not stage.fills:
            self._move(now)
            return
        if drain.before is None:
            drain.before, drain.copied_in = cluster.placement, cluster.generation.number
        self._enter(DrainStep.COPY)
        drain.operation.result["experts_copied"] = len(stage.fills)
        left_s = max(drain.deadline - now, 0.1)
        self._change = EpochChange(cluster, stage, now, limit_s=left_s)

    def _watch_copies(self, now: float) -> None:
        """Go to MOVE once other workers have the experts; after a new generation, repeat COPY."""
        change = self._change
        assert change is not None, "COPY has a running change"
        generation = self._cluster.generation.number
        change.tick(now)
        if not change.is_over:
            return
        self._change = None
        moved, took_s = len(change.stage.fills), now - change.began_at
        if change.state is ChangeState.DONE:
            reason: MoveReason = "scale" if self.record.removes_places else "drain"
            self._cluster.moved(reason, moved, change.num_bytes, took_s)
            self._move(now)
        elif change.generation.number != generation or not self._cluster.runs:
            self._enter(DrainStep.SETTLE)
        else:
            text = f"the experts could not be copied: {change.reason}"
            self._undo(OperationState.FAILED, text, now)

    def _move(self, now: float) -> None:
        self.record.operation.result.setdefault("requests_moved", 0)
        self._count_moved()
        self._asked = next(self._cluster.order_numbers)
        self._hold_back(True)
        self._enter(DrainStep.MOVE)

    def _count_moved(self) -> None:
        """Record the highest number of requests that the drained workers have reported so far."""
        found, result = self._attention(), self.record.operation.result
        held = sum(record.num_requests or 0 for record in found)
        result["requests_moved"] = max(result["requests_moved"], held)

    def _is_empty(self, record: WorkerRecord) -> bool:
        """Return whether the worker has reported no requests after it stopped taking new ones."""
        return record.answered_status_token >= self._asked and record.num_requests == 0

    def _leave(self, now: float) -> None:
        """Form a generation without the drained workers.

        The places of these workers stay empty until the drain ends.
        """
        drain, cluster = self.record, self._cluster
        stage = stage_without(drain.names, cluster)  # workers may have been lost since the copy
        if stage is not None and stage.fills:
            drain.enter(DrainStep.SETTLE)  # copies were lost since then
            return
        why = f"drained {drain.workers} ({drain.operation.id})"
        drain.removes_places |= self._requests.remove_places(drain.names, drain.command.node)
        placement = stage.placement if stage is not None else cluster.placement
        if drain.removes_places and stage is not None:
            gone = {cluster.workers[name].member.device for name in drain.names}
            cluster.membership.desired = without_devices(gone, cluster.desired, cluster.room)
            placement = placement.up_to(cluster.desired.num_devices)
        drain.enter(DrainStep.LEAVE)
        members = [m for m in cluster.round.members if m.name not in drain.names]
        for name in drain.names:
            cluster.workers[name].enter(WorkerState.DRAINED, why)
            cluster.workers[name].operation = drain.operation.id
            cluster.places.cordon(name, drain.command.node)
            if drain.removes_places:
                cluster.places.remove([place_of(name)])
            cluster.round.drop_reports(name)
        cluster.send_snapshot()
        cluster.form(members, placement, now)
        effect = f"continue with {describe_members(members)}, placement epoch {placement.epoch}"
        cluster.note(why, effect, now)

    def _undo(self, state: OperationState, text: str, now: float) -> None:
        """Let the workers take requests again, and restore the former placement if it changed."""
        drain, cluster = self.record, self._cluster
        self._hold_back(False)
        if self._change is not None:
            self._change.cancel("the drain was rolled back")
        back = drain.rollback_placement(cluster.placement, cluster.generation)
        is_whole = cluster.runs and not any(cluster.workers[n].is_lost for n in drain.names)
        if self._change is not None or back is None or not is_whole:
            self._end(state, text, now)
            return
        drain.outcome = (state, text)
        if drain.step is not DrainStep.BACK:  # an earlier controller has already entered it
            self._enter(DrainStep.BACK)
        self._change = EpochChange(cluster, back, now)

    def _watch_return(self, now: float) -> None:
        """End the rollback once the earlier placement is in force or a new generation has begun."""
        drain = self.record
        assert drain.outcome is not None, "a rollback has an outcome"
        if self._change is not None:
            self._change.tick(now)
            if self._change.is_over:
                self._end(*drain.outcome, now)
        elif (self._cluster.runs and self._rebalancing.is_idle) or now > drain.deadline:
            self._undo(*drain.outcome, now)  # an earlier controller began the rollback

    @property
    def _switches(self) -> bool:
        """Whether the workers switch to another placement, which only a new generation stops."""
        change = self._change
        return change is not None and change.state is ChangeState.SWITCH and self._cluster.runs

    def _attention(self) -> list[WorkerRecord]:
        """Return the drained workers that run attention, and therefore hold requests."""
        records = (self._cluster.workers[name] for name in self.record.names)
        return [r for r in records if r.member.runs_attention]

    def _hold_back(self, drains: bool) -> None:
        """Set whether gateways hold back new requests from the drained workers (``drains``)."""
        for record in self._attention():
            record.drains = drains
        self._cluster.touch()

    def _enter(self, step: DrainStep) -> None:
        self.record.enter(step)
        self._cluster.send_snapshot()

    def _end(self, state: OperationState, text: str, now: float) -> None:
        self._cluster.drain = self._change = None
        self._requests.pause(self.record.names, now)
        self._cluster.operations.end(self.record.operation, state, text, now)
