"""A restarted controller learns the cluster anew, from what the workers tell it.

    every worker that still lives calls: Register, WorkerReady, Rejoin (and PeerLost if it lost one)
        ─▶ the newest generation that any of them was told of, its maps, the highest term + 1
        ─▶ all its members run it: it goes on.   Otherwise: the next generation, of those that live

What no worker needs to know (the history, who was lost and why) they keep for the controller: it
is sent to them in a ``Keepsake`` and comes back in ``Rejoin``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.control_frames import (
    ControlFrame,
    DrainWish,
    GenerationReady,
    LoadProgress,
    PeerLost,
    Register,
    Rejoin,
    WorkerReady,
)
from cluster.errors import ConfigError, ProtocolError
from cluster.history import History
from cluster.placement import ExpertPlacement
from cluster.states import WorkerState
from cluster.topology import Generation, Member
from cluster.worker_record import WorkerRecord
from cluster.worker_table import WorkerTable

_KEPT_ENTRIES = 64
_NO_GENERATION = Generation(number=0, members=())


@dataclass(slots=True)
class Greeting:
    """What one worker has said since it found the restarted controller."""

    register: Register | None = None
    member: Member | None = None
    loading: LoadProgress | None = None
    ready: WorkerReady | None = None
    standing: Rejoin | None = None
    generation: Generation = _NO_GENERATION
    """The newest generation that it was told of; number 0 if none."""
    placement: ExpertPlacement | None = None
    """Its maps."""
    wishes_drain: bool = False
    """It was told to end and asks to be drained."""

    def take(self, frame: ControlFrame) -> None:
        """A frame of it; those that only matter later are ignored. Raises ``ProtocolError``."""
        try:
            self._take(frame)
        except (KeyError, TypeError, ValueError, ConfigError) as err:
            raise ProtocolError(f"{type(frame).__name__} makes no sense: {err}") from err

    def _take(self, frame: ControlFrame) -> None:
        match frame:
            case Register():
                self.member = Member(**frame.member)
                self.register = frame
            case LoadProgress():
                self.loading = frame
            case WorkerReady():
                self.ready = frame
            case Rejoin():
                if frame.generation:
                    self.generation = Generation.from_dict(frame.generation)
                    self.placement = ExpertPlacement.from_dict(frame.placement)
                self.standing = frame
            case DrainWish():
                self.wishes_drain = True

    @property
    def is_whole(self) -> bool:
        """It has said all that it says of itself when it calls."""
        return self.register is not None and self.standing is not None

    def runs(self, number: int) -> bool:
        """It runs that generation now."""
        is_running = self.standing is not None and self.standing.running
        return is_running and self.generation.number == number


@dataclass(frozen=True, kw_only=True, slots=True)
class LostWorker:
    """One that is gone for good."""

    member: Member
    """Who it was."""
    state: WorkerState
    """How it ended."""
    reason: str
    """Why."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a ``Keepsake``."""
        return {"member": asdict(self.member), "state": self.state.value, "reason": self.reason}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LostWorker:
        """Inverse of ``to_dict``."""
        state = WorkerState(data["state"])
        return cls(member=Member(**data["member"]), state=state, reason=str(data["reason"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Adopted:
    """The cluster as the workers know it."""

    term: int
    """For the new controller: above every term that a worker has followed."""
    generation: Generation
    """The newest that any worker was told of."""
    placement: ExpertPlacement
    """Its maps."""
    greetings: Mapping[str, Greeting]
    """Workers that have called, by name."""
    memory: Mapping[str, Any]
    """The last ``Keepsake`` of the earlier controller; empty if there was none."""

    @property
    def is_intact(self) -> bool:
        """Every member runs the newest generation: nothing needs to be done."""
        number = self.generation.number
        names = [m.name for m in self.generation.members]
        return all(n in self.greetings and self.greetings[n].runs(number) for n in names)

    @property
    def members(self) -> tuple[Member, ...]:
        """All workers that are known, lost ones included: attention first, then by rank."""
        known = {w.member.name: w.member for w in self.lost}
        known |= {m.name: m for m in self.generation.members}
        for name, greeting in self.greetings.items():
            if greeting.member is not None:
                known.setdefault(name, greeting.member)
        return tuple(sorted(known.values(), key=lambda m: (m.role, m.rank, m.name)))

    @property
    def lost(self) -> tuple[LostWorker, ...]:
        """Workers that the earlier controller had lost or drained."""
        return tuple(LostWorker.from_dict(entry) for entry in self.memory.get("lost", ()))


class Adoption:
    """Collects what the workers say. Times are monotonic seconds, one thread only."""

    def __init__(
        self, expected: Iterable[str], now: float, *, limit_s: float, confirm_s: float
    ) -> None:
        """``expected`` are workers whose processes were found. One that another has lost is waited
        for no longer than ``confirm_s``, any other no longer than ``limit_s``.
        """
        self._expected = set(expected)
        self._greetings: dict[str, Greeting] = {}
        self._deadline = now + limit_s
        self._confirm_s = confirm_s
        self._suspected_at: dict[str, float] = {}

    def frame(self, name: str, frame: ControlFrame, now: float) -> None:
        """A worker said something. Raises ``ProtocolError`` when nobody knows it."""
        if name not in self._expected:
            raise ProtocolError(f"{name} is no worker of this cluster")
        self._greetings.setdefault(name, Greeting()).take(frame)
        if isinstance(frame, PeerLost):
            self._suspected_at.setdefault(frame.worker, now)

    def gone(self, name: str) -> None:
        """A worker's connection or process ended."""
        self._greetings.pop(name, None)
        self._expected.discard(name)

    def is_complete(self, now: float) -> bool:
        """Nobody is waited for any more."""
        return now >= self._deadline or not any(self._is_awaited(n, now) for n in self._expected)

    def result(self) -> Adopted | None:
        """The cluster as far as the workers have told; None when no generation was ever formed."""
        told = {n: g for n, g in self._greetings.items() if g.is_whole}
        formed = [g for g in told.values() if g.placement is not None]
        if not formed:
            return None
        newest = max(formed, key=_age)
        assert newest.placement is not None
        terms = [g.standing.term for g in told.values() if g.standing is not None]
        memories = [g.standing.memory for g in told.values() if g.standing is not None]
        return Adopted(
            term=max(terms) + 1,
            generation=newest.generation,
            placement=newest.placement,
            greetings=told,
            memory=max(memories, key=lambda memory: int(memory.get("version", 0))),
        )

    def _is_awaited(self, name: str, now: float) -> bool:
        if self._greetings.get(name, Greeting()).is_whole:
            return False
        suspected_at = self._suspected_at.get(name)
        return suspected_at is None or now - suspected_at < self._confirm_s


def _age(greeting: Greeting) -> tuple[int, int]:
    return greeting.generation.number, greeting.placement.epoch if greeting.placement else 0


def make_memory(
    history: History, workers: Iterable[WorkerRecord], notes: Mapping[str, Any]
) -> dict[str, Any]:
    """What the next controller must be told besides what the workers know of themselves."""
    lost = [
        LostWorker(member=r.member, state=r.state, reason=r.reason) for r in workers if r.is_lost
    ]
    return {
        "history": history.to_list()[-_KEPT_ENTRIES:],
        "lost": [worker.to_dict() for worker in lost],
        "notes": dict(notes),
    }


def restore_workers(table: WorkerTable, adopted: Adopted) -> None:
    """Bring the records of a new table to where the workers are; the missing stay as they are."""
    for worker in adopted.lost:
        record = table[worker.member.name]
        record.state, record.reason = worker.state, worker.reason  # as it was, not a change
    number = adopted.generation.number
    members = {m.name for m in adopted.generation.members}
    for name, greeting in adopted.greetings.items():
        record = table[name]
        if record.is_lost:
            continue  # it will be told so when it speaks
        assert greeting.register is not None
        record.register(greeting.register)
        if greeting.loading is not None:
            record.load(greeting.loading)
        if greeting.ready is None:
            continue
        record.ready(greeting.ready)
        table.learn_model(record)
        if name in members and greeting.runs(number):
            record.enter(WorkerState.SERVING)


def standing_answers(adopted: Adopted) -> Sequence[tuple[str, GenerationReady]]:
    """The members' standings as if they had just answered the newest generation."""
    members = {m.name for m in adopted.generation.members}
    return [
        (
            name,
            GenerationReady(
                generation=adopted.generation.number,
                highest_step=greeting.standing.highest_step,
                highest_epoch=greeting.standing.highest_epoch,
            ),
        )
        for name, greeting in adopted.greetings.items()
        if name in members and greeting.standing is not None
    ]
