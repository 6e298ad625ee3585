"""The workers as the controller sees them: a record of each, and what they have in common."""

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
from cluster.core.topology import ADDRESS_FIELDS, NODE_FIELDS, Generation, Member
from cluster.policy.failure import Liveness
from cluster.policy.places import place_of
from cluster.policy.progress import StepProgress
from cluster.policy.silence import GapWindow

MODEL_FACTS = ("model_type", "dtype", "kv_cache_dtype", "max_model_len", "vocab_size")
_MAX_LOST = 32
_FORGET_S = 600.0
"""Time for which a worker that is gone stays in the table."""


@dataclass(kw_only=True, slots=True)
class WorkerRecord:
    """One worker as the controller sees it. Owned and changed by the controller only."""

    member: Member
    """Name, role, rank and device are the controller's; process and addresses the worker's own."""
    heard_at: float
    """Monotonic time of the last frame."""
    progress_at: float
    """Monotonic time at which its loop last made progress or was idle."""
    since: float = 0.0
    """Monotonic time of the order to start it, later of its first call."""
    has_process: bool = False
    """Its process runs, while it has not called yet."""
    started_with: ExpertPlacement | None = None
    """It holds its part of this placement; None once it has been in a generation that ran."""
    state: WorkerState = WorkerState.STARTING
    reason: str = ""
    """Reason of the loss."""
    operation: str = ""
    """Id of the operation that drained it."""
    drains: bool = False
    """It takes no new request; its running ones move elsewhere."""
    loaded_bytes: int = 0
    """Weights read so far."""
    total_bytes: int = 0
    """Weights to read; 0 while unknown."""
    build: Build | None = None
    """None before ``Register``."""
    info: dict[str, Any] = field(default_factory=dict)
    """Facts from ``Register`` and ``WorkerReady``."""
    stats: dict[str, float] = field(default_factory=dict)
    """Numbers of its last heartbeat or status reply."""
    asked: int | None = None
    """Token of the request for its numbers that it has not answered."""
    answered: int = 0
    """Token of the newest such request that it has answered."""
    mismatch: tuple[int, float] | None = None
    """Generation in which its heartbeats differ from what the controller knows, and since when."""
    generation: int = 0
    """The generation that it had begun to join at its last heartbeat, or ran."""
    starved_s: float = 0.0
    """Time for which it has waited for a processor since its last sign of life."""
    starved_steps_s: float = 0.0
    """The same since its last progress."""
    gaps: GapWindow = field(default_factory=GapWindow)
    """How long workers of its host were silent; detection shares it among them."""
    disconnected: str = ""
    """Why its control connection has closed; empty while it is open."""
    call_again_by: float = 0.0
    """Monotonic time until which a disconnected worker may call again."""
    is_waiting: bool = False
    """It waited for a peer within a step at its last heartbeat."""
    stalled_s: float | None = None
    """As of its last heartbeat."""
    waits_for: tuple[str, ...] = ()
    """As of its last heartbeat."""
    low_disks: tuple[frames.LowDisk, ...] = ()
    """Of its host, by its last heartbeat."""
    adapters: tuple[str, ...] = ()
    """Keys of adapters that its requests had at its last heartbeat."""
    problems: tuple[str, ...] = ()
    """What keeps parts of it from working, by its last heartbeat."""
    kept_version: int = 0
    """Version of the newest controller snapshot that it keeps."""
    gone_at: float | None = None
    """Monotonic time at which ``WorkerTable.forget`` first saw it lost or drained."""
    awaits_adapters: bool = False
    """It may join others only once it has all adapters."""
    _progress: int = -1

    @property
    def name(self) -> str:
        return self.member.name

    @property
    def is_coming(self) -> bool:
        """Asked for or loading: it has never been ready."""
        return self.state in (WorkerState.STARTING, WorkerState.LOADING)

    @property
    def is_starting(self) -> bool:
        """It is coming, and does not wait for room."""
        return self.is_coming and (self.has_process or self.state is WorkerState.LOADING)

    @property
    def is_ready(self) -> bool:
        """Its weights are in memory, and it lives; it may serve."""
        return self.state in (WorkerState.READY, WorkerState.SERVING)

    @property
    def loads_adapters(self) -> bool:
        """Its weights are in memory, and it does not have all adapters yet."""
        return self.is_ready and self.awaits_adapters

    @property
    def may_join(self) -> bool:
        """It is ready, and has all adapters."""
        return self.is_ready and not self.awaits_adapters

    @property
    def is_lost(self) -> bool:
        """Lost or drained: the controller expects nothing more from it."""
        return self.state in GONE

    @property
    def num_requests(self) -> int | None:
        """Requests that run or wait there, by its last numbers; None without any."""
        running, waiting = (self.stats.get(f"num_requests_{k}") for k in ("running", "waiting"))
        return None if running is None else int(running + (waiting or 0.0))

    def enter(self, state: WorkerState, reason: str = "") -> None:
        """Change the state. Raises ``IllegalTransitionError``."""
        self.state = next_state(self.state, state)
        self.reason = reason or self.reason

    def register(self, frame: frames.Register) -> None:
        """The worker called for the first time, with its process id and addresses.

        Raises ``ProtocolError`` for another worker and ``DuplicateRegistrationError`` for a second
        call.
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

    def load(self, frame: frames.LoadProgress) -> None:
        self.loaded_bytes = frame.loaded_bytes
        self.total_bytes = frame.total_bytes

    def ready(self, frame: frames.WorkerReady) -> None:
        """Its weights are in memory. Raises ``ProtocolError`` if it was not loading."""
        if self.state is not WorkerState.LOADING:
            raise ProtocolError(f"{self.name} is ready while {self.state.value}")
        self.info.update(frame.info)
        speed = frame.info.get("device_speed")
        if isinstance(speed, (int, float)) and math.isfinite(speed) and speed > 0:
            self.member = replace(self.member, speed=float(speed))  # not that of its node's label
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
        """Keep the finite numbers of a heartbeat, or of a status reply even if it is late."""
        if isinstance(frame, frames.StatusReply):
            self.answered = max(self.answered, frame.token)
            if frame.token == self.asked:
                self.asked = None
        self.stats = {
            name: value
            for name, value in frame.stats.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        }

    def credit(self, seconds: float, now: float) -> None:
        """Advance its clocks by a pause of the controller itself."""
        self.call_again_by += seconds
        self.heard_at = min(now, self.heard_at + seconds)
        self.progress_at = min(now, self.progress_at + seconds)

    def starve(self, seconds: float, at_most: float, now: float) -> None:
        """Advance its clocks by a wait for a processor, each by ``at_most`` since it was set."""
        silence_s = min(seconds, max(0.0, at_most - self.starved_s))
        stall_s = min(seconds, max(0.0, at_most - self.starved_steps_s))
        self.starved_s += silence_s
        self.starved_steps_s += stall_s
        self.heard_at = min(now, self.heard_at + silence_s)
        self.progress_at = min(now, self.progress_at + stall_s)

    def pulse(self) -> Liveness:
        """Input of the failure policy. Gaps count in a running generation only."""
        return Liveness(
            name=self.name,
            heard_at=self.heard_at,
            progress_at=self.progress_at,
            waiting=self.is_waiting,
            running=self.state is WorkerState.SERVING,
            host=self.member.node,
            patience_s=self.gaps.patience_s if self.state is WorkerState.SERVING else math.inf,
        )

    def pace(self) -> StepProgress:
        """Its part in the steps."""
        return StepProgress(
            name=self.name,
            heard_at=self.heard_at,
            runs_attention=self.member.runs_attention,
            stalled_s=self.stalled_s,
            waits_for=self.waits_for,
        )

    def to_dict(self, num_slots: int) -> dict[str, Any]:
        """Its entry in a snapshot; ``num_slots`` per bank, where it holds experts."""
        shown = self.state
        if self.drains and not self.is_lost:
            shown = WorkerState.DRAINING
        elif self.loads_adapters:  # gateways send it nothing yet
            shown = WorkerState.LOADING
        blocks = (self.stats.get(f"kv_blocks_{kind}") for kind in ("free", "total"))
        free, total = (None if number is None else int(number) for number in blocks)
        return {
            "name": self.name,
            "role": self.member.role,
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
    """Records by name, in rank order, lost ones included. Owned by the controller."""

    def __init__(self, members: Sequence[Member], *, model: ModelSection, now: float) -> None:
        """Attention workers add more facts of the model when they are ready."""
        self._records: dict[str, WorkerRecord] = {}
        self.lost_at = -math.inf
        """Monotonic time of the last loss."""
        for member in members:
            self.add(member, now)
        names = {"name": model.served_model_name, "path": model.path}
        self.model: dict[str, Any] = {**dict.fromkeys(MODEL_FACTS), **names}
        """Name, path and facts; None for unknown ones."""

    def __iter__(self) -> Iterator[WorkerRecord]:
        return iter(self._records.values())

    def __getitem__(self, name: str) -> WorkerRecord:
        return self._records[name]

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def add(self, member: Member, now: float, started_with: ExpertPlacement | None = None) -> None:
        """Add a worker that is about to start. The oldest of many lost ones is forgotten."""
        self._records[member.name] = WorkerRecord(
            member=member, heard_at=now, progress_at=now, since=now, started_with=started_with
        )
        lost = [name for name, record in self._records.items() if record.is_lost]
        for name in lost[:-_MAX_LOST]:
            del self._records[name]

    def lose(self, reasons: Mapping[str, str], now: float) -> dict[str, str]:
        """Declare workers lost; those (name -> reason) that were not lost before."""
        fresh = {n: r for n, r in reasons.items() if not self._records[n].is_lost}
        for name, reason in fresh.items():
            self._records[name].enter(WorkerState.LOST, reason)
            self.lost_at = now
        return fresh

    def forget(self, now: float) -> None:
        """Drop workers that are gone for ``_FORGET_S``: lost ones once they have a successor."""
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
        """The record of ``name``. Raises ``ProtocolError`` for an unknown name."""
        if name not in self._records:
            raise ProtocolError(f"{name} is no worker of this cluster")
        return self._records[name]

    def alive(self) -> list[WorkerRecord]:
        """Workers that are not lost."""
        return [r for r in self if not r.is_lost]

    def pulses(self, loading: bool) -> list[Liveness]:
        """The last load progress of the workers that load or have loaded."""
        if loading:
            return [r.pulse() for r in self.alive() if r.state is WorkerState.LOADING]
        return [r.pulse() for r in self.alive() if not r.is_coming]

    def misfit(self, name: str, generation: Generation) -> str | None:
        """Why a worker that has registered cannot serve with the others, if it cannot.

        The members of the newest generation are the measure; before the first, all workers.
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
        """All workers that were asked have answered, or are lost."""
        return all(r.asked is None for r in self.alive())

    def learn_model(self, record: WorkerRecord) -> None:
        """Take the model's facts from an attention worker that is ready."""
        if record.member.runs_attention:
            self.model.update({k: record.info[k] for k in MODEL_FACTS if k in record.info})

    def by_device(self, num_devices: int) -> list[WorkerRecord | None]:
        """``[device]`` -> the newest worker that holds or held its experts, if one is known."""
        by_life = sorted(self, key=lambda r: not r.is_lost)  # those that live come last
        found = {r.member.device: r for r in by_life if r.member.holds_experts}
        found = found or {0: list(self)[-1]}  # local mode
        return [found.get(device) for device in range(num_devices)]
