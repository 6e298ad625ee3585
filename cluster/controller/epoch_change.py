"""One change of the placement while serving: load, prepare every member, switch between two steps.

    LOAD      weights go into free slots, in the background, from other workers' memory
    PREPARE   every member learns the maps of the new epoch
    SWITCH    the next header of each step group's leader names the new epoch; afterwards its group
              never runs the old one

A change that fails before SWITCH has no effect: the epoch in force stays. A new generation ends the
change at any point: the placement in force is then the old or the new one, and every member can run
either of them, because only a later change overwrites slots that the old placement needs.
``EpochChange`` decides the next step; its owner acts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum

from msgspec import structs

from cluster.controller.cluster import Cluster
from cluster.controller.expert_load_commands import CHECKPOINT, ExpertLoadCommands
from cluster.core.frames import (
    ControlFrame,
    EpochReady,
    EpochSwitched,
    ExpertsLoaded,
    NewEpoch,
    SwitchEpoch,
)
from cluster.core.states import next_state
from cluster.planner.stages import SlotFill, Stage


class ChangeState(Enum):
    """Step of a change of the placement; the value is shown to users."""

    LOAD = "load experts"
    PREPARE = "tell the workers"
    SWITCH = "switch at one step of each group"
    DONE = "done"
    FAILED = "failed"


_NEXT = {
    ChangeState.LOAD: {ChangeState.PREPARE, ChangeState.FAILED},
    ChangeState.PREPARE: {ChangeState.SWITCH, ChangeState.FAILED},
    ChangeState.SWITCH: {ChangeState.DONE, ChangeState.FAILED},
}


class EpochChange:
    """Runs one change of the placement. ``now`` is in monotonic seconds."""

    def __init__(
        self,
        cluster: Cluster,
        stage: Stage,
        now: float,
        *,
        limit_s: float = 120.0,
        bytes_per_s: float | None = None,
    ) -> None:
        """Begin to change to the placement of ``stage``, in an epoch that no worker has seen.

        ``limit_s`` is the time limit up to the switch; ``bytes_per_s`` limits the rate at which
        each worker reads weights, None for no limit.
        """
        self.state = ChangeState.LOAD
        self.reason = ""
        """Reason why the change failed; empty if it has not failed."""
        self.num_bytes = 0
        """Bytes of expert weights that workers have loaded for the change so far."""
        self.num_loaded = 0
        """Number of experts that workers have loaded into their slots so far."""
        epoch = cluster.membership.next_epoch()
        self.stage = replace(stage, placement=structs.replace(stage.placement, epoch=epoch))
        self._cluster = cluster
        self._limit_s = limit_s
        self._bytes_per_s = bytes_per_s
        self.generation = cluster.generation
        """Generation in which the change began; the change fails when another one begins."""
        self._base = cluster.placement
        self.began_at = now
        """Monotonic time at which the change began, in seconds."""
        self._deadline = now + limit_s
        self._orders = ExpertLoadCommands(cluster)
        self._unready: set[str] = set()
        self._switching: set[str] = set()
        """Leaders that have not switched."""
        for member in self.generation.experts:
            fills = [f for f in stage.fills if f.device == member.device]
            self._order_all(member.name, fills, frozenset(), now)
        if not self._orders.pending:
            self._prepare()

    @property
    def is_over(self) -> bool:
        """Whether the change succeeded or failed."""
        return self.state in (ChangeState.DONE, ChangeState.FAILED)

    @property
    def loading(self) -> list[dict[str, str]]:
        """The running transfers of experts, each with the keys ``worker`` and ``from``.

        The values are names of workers; ``from`` may be ``checkpoint`` instead.
        """
        names = {m.device: m.name for m in self.generation.experts}
        return [
            {"worker": o.worker, "from": names.get(o.source, "checkpoint")}
            for o in self._orders.pending.values()
        ]

    def tick(self, now: float) -> None:
        """Fail the change if its time limit is over or another generation has begun."""
        if self.is_over:
            return
        if self._cluster.generation.number != self.generation.number:
            self._fail(f"generation {self._cluster.generation.number} began")
        elif now > self._deadline and self.state is not ChangeState.SWITCH:
            self._fail(f"could not {self.state.value} within {self._limit_s:g} s")

    def cancel(self, reason: str) -> bool:
        """Abandon the change; return False if it can no longer be stopped or has ended."""
        if self.state is ChangeState.SWITCH or self.is_over:
            return False
        self._fail(reason)
        return True

    def frame(self, name: str, frame: ControlFrame, now: float) -> None:
        """Handle a worker's frame about the placement change; other frames are ignored."""
        match frame:
            case ExpertsLoaded():
                self._loaded(name, frame, now)
            case EpochReady() if self.state is ChangeState.PREPARE and self._is_ours(frame):
                self._ready(name, frame)
            case EpochSwitched() if self.state is ChangeState.SWITCH and self._is_ours(frame):
                self._switching.discard(name)
                if self._switching:
                    return
                self._enter(ChangeState.DONE)
                self._cluster.membership.activate(self.stage.placement)
                self._cluster.touch()

    def _loaded(self, name: str, frame: ExpertsLoaded, now: float) -> None:
        """Handle the reply of worker ``name`` to a command to load experts."""
        order = self._orders.answered(name, frame.order)
        if self.state is not ChangeState.LOAD or order is None:
            return
        self.num_bytes += frame.num_bytes
        if frame.error and order.source == CHECKPOINT:
            self._fail(f"{name}: {frame.error}")
        elif frame.error:
            tried = order.tried | {order.source}
            self._order_all(name, order.fills, tried, now)
        else:
            self.num_loaded += len(order.fills)
        if self.state is ChangeState.LOAD and not self._orders.pending:
            self._prepare()

    def _ready(self, name: str, frame: EpochReady) -> None:
        """Handle the reply of a worker to the new placement epoch; the reply may be an error."""
        if frame.error:
            self._fail(f"{name}: {frame.error}")
            return
        self._unready.discard(name)
        if not self._unready:
            self._switch()

    def _is_ours(self, frame: EpochReady | EpochSwitched) -> bool:
        newest, epoch = self._cluster.generation.number, self.stage.placement.epoch
        return (frame.generation, frame.epoch) == (newest, epoch)

    def _enter(self, state: ChangeState) -> None:
        self.state = next_state(self.state, state, _NEXT)

    def _order_all(
        self, worker: str, fills: Sequence[SlotFill], tried: frozenset[int], now: float
    ) -> None:
        """Send ``worker`` a load command for each source.

        Sources are live devices that hold an expert and are not in ``tried``, or the checkpoint.
        The nearest devices are preferred; equally near ones share the experts evenly.
        """
        by_source: dict[int, list[SlotFill]] = {}
        used = Counter({o.source: len(o.fills) for o in self._orders.pending.values()})
        members = {m.device: m for m in self.generation.experts}
        for fill in fills:
            near = members[fill.device].nearness
            able = [d for d in fill.sources if d in members and d not in tried]
            source = min(able, key=lambda d: (-near(members[d]), used[d], d), default=CHECKPOINT)
            used[source] += 1
            by_source.setdefault(source, []).append(fill)
        for source, own in by_source.items():
            details = self._source(source, now)
            self._orders.send(worker, own, now, source=source, tried=tried, details=details)

    def _source(self, device: int, now: float) -> dict[str, object]:
        limits = {"limit_s": max(self._deadline - now, 0.1), "bytes_per_s": self._bytes_per_s}
        if device == CHECKPOINT:
            return {"kind": "checkpoint", **limits}
        peer = next(m for m in self.generation.experts if m.device == device)
        return {"kind": "peer", "peer": peer.name, "address": peer.weights_address, **limits}

    def _prepare(self) -> None:
        self._enter(ChangeState.PREPARE)
        before, after = self._base.banks, self.stage.placement.banks
        changed = tuple(
            (place, new)
            for place, (old, new) in enumerate(zip(before, after, strict=True))
            if old != new
        )
        frame = NewEpoch(
            generation=self.generation.number,
            epoch=self.stage.placement.epoch,
            base_epoch=self._base.epoch,
            banks=changed,
        )
        self._unready = {m.name for m in self.generation.members}
        self._cluster.send(frame, *(m.name for m in self.generation.members))

    def _switch(self) -> None:
        self._enter(ChangeState.SWITCH)
        epoch = self.stage.placement.epoch
        leaders = [ranks[0].name for ranks in self.generation.groups]
        self._switching = set(leaders)
        if len(leaders) > 1:
            self._cluster.membership.begin_switch(epoch)
        # While one group runs the new epoch, another one may still run the epoch before.
        oldest = epoch if len(leaders) == 1 else self._base.epoch
        order = SwitchEpoch(generation=self.generation.number, epoch=epoch, oldest_epoch=oldest)
        self._cluster.send(order, *leaders)

    def _fail(self, reason: str) -> None:
        self._enter(ChangeState.FAILED)
        self.reason = reason
        self._orders.give_up()
