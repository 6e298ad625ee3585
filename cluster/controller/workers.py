"""The controller's table of workers: a record of each worker, and facts about the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from cluster.config.model import ModelSection
from cluster.core import frames
from cluster.core.errors import DuplicateRegistrationError, ProtocolError
from cluster.core.placement import ExpertPlacement
from cluster.core.release import Build, differing_item
from cluster.core.states import GONE, WorkerState, next_state
from cluster.core.topology import ADDRESS_FIELDS, NODE_FIELDS, Generation, Member, StepGroup
from cluster.policy.failure import Liveness
from cluster.policy.places import place_of
from cluster.policy.progress import StepProgress
from cluster.policy.silence import GapWindow

MODEL_FACTS = ("model_type", "dtype", "kv_cache_dtype", "max_model_len", "vocab_size")
_MAX_LOST = 32
_NEWLY_LOST_S = 60.0
"""Seconds for which every lost worker stays in the table, since peers may still report its loss."""
_FORGET_S = 600.0
"""Seconds for which a worker that was lost or drained stays in the controller's table."""


@dataclass(kw_only=True, slots=True)
class WorkerRecord:
    """One worker as the controller sees it. Owned and changed by the controller only."""

    member: Member
    """Identity of the worker: name, role, rank, device, process and addresses.

    The worker reports its process and addresses when it registers.
    """
    heard_at: float
    """Monotonic time at which the last frame of the worker arrived."""
    progress_at: float
    """Monotonic time at which the worker's step loop last made progress or was idle."""
    since: float = 0.0
    """Monotonic time of the start of the worker's process or, once registered, of registration."""
    has_process: bool = False
    """Whether the worker's process has started; it may not have connected yet."""
    started_with: ExpertPlacement | None = None
    """Placement of which a new worker loads its part; None once it was in a running generation.

    Also None for workers of the cluster's first start.
    """
    state: WorkerState = WorkerState.STARTING
    reason: str = ""
    """Reason why the worker was lost or drained; empty before."""
    operation: str = ""
    """Id of the operation that drained the worker; empty if it was not drained."""
    drains: bool = False
    """Whether gateways send the worker no new requests and move its requests to other workers."""
    loaded_bytes: int = 0
    """Bytes of weights that the worker has read so far."""
    total_bytes: int = 0
    """Bytes of weights that the worker reads at its start; 0 while unknown."""
    build: Build | None = None
    """Release, checkpoint and configuration of the worker; None before it has registered."""
    info: dict[str, Any] = field(default_factory=dict)
    """Facts that the worker reported when it registered and when it was ready."""
    stats: dict[str, float] = field(default_factory=dict)
    """Gauges and counters from the worker's last heartbeat or status reply."""
    pending_status_token: int | None = None
    """Token of the status request that the worker has not answered yet; None without one."""
    answered_status_token: int = 0
    """Token of the newest status request that the worker has answered; 0 before the first."""
    mismatch: tuple[int, float] | None = None
    """(generation in force, time since which the worker's heartbeats contradict it), or None."""
    generation: int = 0
    """Generation that the worker ran or was joining at its last heartbeat."""
    starved_s: float = 0.0
    """Seconds for which the worker has waited for a processor since its last sign of life."""
    starved_steps_s: float = 0.0
    """Seconds for which the worker has waited for a processor since its last progress."""
    gaps: GapWindow = field(default_factory=GapWindow)
    """Recent gaps between frames of the workers on the worker's host, which share this object."""
    disconnected: str = ""
    """Reason why the worker's control connection has closed; empty while it is open."""
    call_again_by: float = 0.0
    """Monotonic time by which a disconnected worker must connect again."""
    is_waiting: bool = False
    """Whether the worker waited for a peer within a step at its last heartbeat."""
    stalled_s: float | None = None
    """Seconds for which the worker's step had stalled at its last heartbeat; None for no step."""
    waits_for: tuple[str, ...] = ()
    """Names of the peers for which the worker's step waited at its last heartbeat."""
    low_disks: tuple[frames.LowDisk, ...] = ()
    """Nearly full disks of the worker's host, from its last heartbeat."""
    adapters: tuple[str, ...] = ()
    """Keys of the adapters that the worker's requests used at its last heartbeat."""
    problems: tuple[str, ...] = ()
    """Texts about parts of the worker that do not work, from its last heartbeat."""
    kept_version: int = 0
    """Version of the newest controller snapshot that the worker has stored; 0 for none."""
    gone_at: float | None = None
    """Monotonic time at which ``WorkerTable.forget`` first saw the worker lost or drained."""
    awaits_adapters: bool = False
    """Whether the worker still lacks adapters without which it may not join a generation."""
    _progress: int = -1

    @property
    def name(self) -> str:
        return self.member.name

    @property
    def is_pending(self) -> bool:
        """Whether the worker starts or loads weights, and has never been ready."""
        return self.state in (WorkerState.STARTING, WorkerState.LOADING)

    @property
    def is_starting(self) -> bool:
        """Whether the worker is starting or loading, and not only waiting for resources."""
        return self.is_pending and (self.has_process or self.state is WorkerState.LOADING)

    @property
    def is_ready(self) -> bool:
        """Whether the worker is alive with its weights in memory."""
        return self.state in (WorkerState.READY, WorkerState.SERVING)

    @property
    def loads_adapters(self) -> bool:
        """Whether the worker's weights are in memory, but not yet all adapters."""
        return self.is_ready and self.awaits_adapters

    @property
    def may_join(self) -> bool:
        """Whether the worker has its weights and all adapters in memory, and may join."""
        return self.is_ready and not self.awaits_adapters

    @property
    def is_lost(self) -> bool:
        """Whether the worker is lost or drained: the controller expects no more frames from it."""
        return self.state in GONE

    @property
    def num_requests(self) -> int | None:
        """Number of requests that run or wait on the worker; None before it has reported stats."""
        running, waiting = (self.stats.get(f"num_requests_{k}") for k in ("running", "waiting"))
        return None if running is None else int(running + (waiting or 0.0))

    def enter(self, state: WorkerState, reason: str = "") -> None:
        """Change the state of the worker. Raises ``IllegalTransitionError``."""
        self.state = next_state(self.state, state)
        self.reason = reason or self.reason

    def register(self, frame: frames.Register) -> None:
        """Record the registration of the worker, with its process id and addresses.

        Raises ``ProtocolError`` if the frame names another worker, and
        ``DuplicateRegistrationError`` for a second registration.
        """
        claimed = frame.member
        if claimed.name != self.name:
            raise ProtocolError(f"{self.name} registers as {claimed.name!r}")
        if self.state is not WorkerState.STARTING:
            raise DuplicateRegistrationError(f"{self.name} registers again ({self.state.value})")
        own = (*ADDRESS_FIELDS, "offer", *(() if self.member.node else NODE_FIELDS))
        facts = {key: getattr(claimed, key) for key in own}
        node = self.member.node or claimed.node
        self.member = replace(self.member, node=node, pid=claimed.pid, **facts)
        self.build = frame.build
        self.info.update(frame.info)
        self.enter(WorkerState.LOADING)

    def set_group(self, group: StepGroup) -> None:
        """Set the step group of the worker, from the next generation on."""
        self.member = replace(self.member, group=group)

    def load(self, frame: frames.LoadProgress) -> None:
        self.loaded_bytes = frame.loaded_bytes
        self.total_bytes = frame.total_bytes

    def ready(self, frame: frames.WorkerReady) -> None:
        """Record that the worker's weights are in memory.

        Raises ``ProtocolError`` if the worker was not loading.
        """
        if self.state is not WorkerState.LOADING:
            raise ProtocolError(f"{self.name} is ready while {self.state.value}")
        self.info.update(frame.info)
        speed = frame.info.get("device_speed")
        if isinstance(speed, (int, float)) and math.isfinite(speed) and speed > 0:
            self.member = replace(self.member, speed=float(speed))  # replaces the label's
        self.loaded_bytes = max(self.loaded_bytes, self.total_bytes)
        self.enter(WorkerState.READY)

    def beat(self, frame: frames.Heartbeat, now: float) -> None:
        if frame.idle or frame.progress != self._progress:
            self.progress_at, self.starved_steps_s = now, 0.0
        self._progress = frame.progress
        self.is_waiting = frame.waiting
        self.stalled_s, self.waits_for = frame.stalled_s, frame.waits_for
        self.generation = frame.generation
        self.low_disks = frame.low_disks
        self.adapters = frame.adapters
        self.problems = frame.problems
        self.take_numbers(frame)

    def take_numbers(self, frame: frames.Heartbeat | frames.StatusReply) -> None:
        """Replace the worker's stats by the finite numbers of a heartbeat or status reply."""
        if isinstance(frame, frames.StatusReply):
            self.answered_status_token = max(self.answered_status_token, frame.token)
            if frame.token == self.pending_status_token:
                self.pending_status_token = None
        self.stats = {
            name: value
            for name, value in frame.stats.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        }

    def credit(self, seconds: float, now: float) -> None:
        """Advance the worker's clocks by a pause of the controller, which is not silence."""
        self.call_again_by += seconds
        self.heard_at = min(now, self.heard_at + seconds)
        self.progress_at = min(now, self.progress_at + seconds)

    def starve(self, seconds: float, at_most: float, now: float) -> None:
        """Advance the worker's clocks by ``seconds`` of waiting for a processor.

        Each clock advances by at most ``at_most`` seconds in total since the last sign of life or
        progress.
        """
        silence_s = min(seconds, max(0.0, at_most - self.starved_s))
        stall_s = min(seconds, max(0.0, at_most - self.starved_steps_s))
        self.starved_s += silence_s
        self.starved_steps_s += stall_s
        self.heard_at = min(now, self.heard_at + silence_s)
        self.progress_at = min(now, self.progress_at + stall_s)

    def liveness(self) -> Liveness:
        """Return the worker's input of the failure policy; infinite patience unless it serves."""
        return Liveness(
            name=self.name,
            heard_at=self.heard_at,
            progress_at=self.progress_at,
            waiting=self.is_waiting,
            running=self.state is WorkerState.SERVING,
            host=self.member.node,
            patience_s=self.gaps.patience_s if self.state is WorkerState.SERVING else math.inf,
        )

    def step_progress(self) -> StepProgress:
        """Return the worker's input of the policy that finds workers for which steps wait."""
        return StepProgress(
            name=self.name,
            heard_at=self.heard_at,
            runs_attention=self.member.runs_attention,
            stalled_s=self.stalled_s,
            waits_for=self.waits_for,
            group=self.member.group if self.member.runs_attention else "",
        )

    def to_dict(self, num_slots: int) -> dict[str, Any]:
        """Return the worker's entry in the status; ``num_slots``: its expert slots per bank."""
        shown = self.state
        if self.drains and not self.is_lost:
            shown = WorkerState.DRAINING
        elif self.loads_adapters:  # gateways do not use it yet
            shown = WorkerState.LOADING
        blocks = (self.stats.get(f"kv_blocks_{kind}") for kind in ("free", "total"))
        free, total = (None if number is None else int(number) for number in blocks)
        return {
            "name": self.name,
            "role": self.member.role,
            "group": self.member.group or None,
            "rank": self.member.rank,
            "node": self.member.node,
            "pid": self.member.pid or None,
            "state": shown.value,
            "device": self.info.get("device"),
            "threads": self.info.get("threads"),
            "kernels": self.info.get("kernels"),
            "reason": self.reason,
            "engine_address": self.member.engine_address,
            "loaded_bytes": self.loaded_bytes,
            "total_bytes": self.total_bytes,
            "kv_blocks_free": free,
            "kv_blocks_total": total,
            "kv_usage": (1.0 - free / total) if free is not None and total else None,
            "slots": num_slots if self.member.holds_experts else None,
            "patience_s": None if math.isinf(patience := self.gaps.patience_s) else patience,
            "stats": dict(self.stats),
        }


class WorkerTable:
    """Worker records by name, in rank order, including lost ones. Owned by the controller."""

    def __init__(self, members: Sequence[Member], *, model: ModelSection, now: float) -> None:
        """``model`` has the model's name and path; attention workers add facts once ready."""
        self._records: dict[str, WorkerRecord] = {}
        self.lost_at = -math.inf
        """Monotonic time at which a worker was last lost; negative infinity before."""
        for member in members:
            self.add(member, now)
        names = {"name": model.served_model_name, "path": model.path}
        self.model: dict[str, Any] = {**dict.fromkeys(MODEL_FACTS), **names}
        """Name, path and facts of the model; None for unknown facts."""

    def __iter__(self) -> Iterator[WorkerRecord]:
        return iter(self._records.values())

    def __getitem__(self, name: str) -> WorkerRecord:
        return self._records[name]

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def add(self, member: Member, now: float, started_with: ExpertPlacement | None = None) -> None:
        """Add a worker that is about to start; drop all but the newest ``_MAX_LOST`` lost ones.

        Workers that were lost less than ``_NEWLY_LOST_S`` ago are not counted, and stay.
        ``started_with``: placement of which the worker loads its part; None at the first start.
        """
        self._records[member.name] = WorkerRecord(
            member=member, heard_at=now, progress_at=now, since=now, started_with=started_with
        )
        since = now - _NEWLY_LOST_S
        gone = {n: r.gone_at for n, r in self._records.items() if r.gone_at is not None}
        lost = [name for name, gone_at in gone.items() if gone_at < since]
        for name in lost[:-_MAX_LOST]:
            del self._records[name]

    def lose(self, reasons: Mapping[str, str], now: float) -> dict[str, str]:
        """Declare workers (name -> reason) lost; return the ones that were not lost before."""
        fresh = {n: r for n, r in reasons.items() if not self._records[n].is_lost}
        for name, reason in fresh.items():
            self._records[name].enter(WorkerState.LOST, reason)
            self.lost_at = now
        return fresh

    def forget(self, now: float) -> None:
        """Drop drained workers, and lost workers that were replaced, after ``_FORGET_S``."""
        last_of_place = {place_of(name): name for name in self._records}
        for name, record in list(self._records.items()):
            if not record.is_lost:
                continue
            record.gone_at = now if record.gone_at is None else record.gone_at
            has_successor = last_of_place[place_of(name)] != name
            is_needless = has_successor or record.state is WorkerState.DRAINED
            if is_needless and now - record.gone_at > _FORGET_S:
                del self._records[name]

    def find(self, name: str) -> WorkerRecord:
        """Return the record of worker ``name``. Raises ``ProtocolError`` for an unknown name."""
        if name not in self._records:
            raise ProtocolError(f"{name} is no worker of this cluster")
        return self._records[name]

    def alive(self) -> list[WorkerRecord]:
        """Return the workers that are neither lost nor drained."""
        return [r for r in self if not r.is_lost]

    def pulses(self, loading: bool) -> list[Liveness]:
        """Return the liveness of the workers that are loading, or of those that have loaded."""
        if loading:
            return [r.liveness() for r in self.alive() if r.state is WorkerState.LOADING]
        return [r.liveness() for r in self.alive() if not r.is_pending]

    def incompatibility(self, name: str, generation: Generation) -> str | None:
        """Return why worker ``name`` cannot serve with the other workers; None if it can.

        The worker is compared with a member of the newest generation (``generation``) or, before
        the first one, with any registered worker.
        """
        names = {m.name for m in generation.members}
        others = [r for r in self.alive() if r.build is not None and r.name != name]
        measure = [r for r in others if r.name in names] or others
        own = self._records[name]
        if not measure or own.build is None or measure[0].build is None or name in names:
            return None
        differing = differing_item(measure[0].name, measure[0].build, name, own.build)
        if differing is not None or not own.member.offer.is_strict:
            return differing
        return generation.successor([r.member for r in (*measure, own)]).agreement.reason or None

    @property
    def status_complete(self) -> bool:
        """Whether every live worker has answered its last status request."""
        return all(r.pending_status_token is None for r in self.alive())

    def learn_model(self, record: WorkerRecord) -> None:
        """Copy the facts of the model from an attention worker that is ready."""
        if record.member.runs_attention:
            self.model.update({k: record.info[k] for k in MODEL_FACTS if k in record.info})

    def by_device(self, num_devices: int) -> list[WorkerRecord | None]:
        """Return, for each device, the newest worker that holds or held its experts, or None."""
        by_life = sorted(self, key=lambda r: not r.is_lost)  # live workers last
        found = {r.member.device: r for r in by_life if r.member.holds_experts}
        found = found or {0: list(self)[-1]}  # local mode
        return [found.get(device) for device in range(num_devices)]
