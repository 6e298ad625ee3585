"""All workers of one cluster as the controller sees them, and what they have in common."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from cluster.controller.parts.worker_record import WorkerRecord
from cluster.core.errors import ProtocolError
from cluster.core.frames import StatusReply, StatusRequest
from cluster.core.placement import ExpertPlacement
from cluster.core.release import differing_item
from cluster.core.states import WorkerState
from cluster.core.topology import Member
from cluster.policy.failure import Pulse

MODEL_FACTS = ("model_type", "dtype", "max_model_len", "vocab_size")
_MAX_LOST = 32


class WorkerTable:
    """Records by name, in rank order, lost ones included. Owned by the controller."""

    def __init__(
        self, members: Sequence[Member], *, num_slots: int, model: Mapping[str, Any], now: float
    ) -> None:
        """``model`` holds name and path; attention workers add the rest when they are ready."""
        self._num_slots = num_slots
        self._records: dict[str, WorkerRecord] = {}
        for member in members:
            self.add(member, now)
        self.model: dict[str, Any] = {**dict.fromkeys(MODEL_FACTS), **model}
        """Name, path and facts; None for unknown ones."""
        self._status_token = 0
        self._status_pending: set[str] = set()

    def __iter__(self) -> Iterator[WorkerRecord]:
        return iter(self._records.values())

    def __getitem__(self, name: str) -> WorkerRecord:
        return self._records[name]

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def add(self, member: Member, now: float, started_with: ExpertPlacement | None = None) -> None:
        """Add a worker that is about to start. The oldest of many lost ones is forgotten."""
        self._records[member.name] = WorkerRecord(
            member=member,
            heard_at=now,
            progress_at=now,
            since=now,
            started_with=started_with,
            num_slots=self._num_slots,
        )
        lost = [name for name, record in self._records.items() if record.is_lost]
        for name in lost[:-_MAX_LOST]:
            del self._records[name]

    def find(self, name: str) -> WorkerRecord:
        """The record of ``name``. Raises ``ProtocolError`` for an unknown name."""
        if name not in self._records:
            raise ProtocolError(f"{name} is no worker of this cluster")
        return self._records[name]

    def alive(self) -> list[WorkerRecord]:
        """Workers that are not lost."""
        return [r for r in self if not r.is_lost]

    def pulses(self, loading: bool) -> list[Pulse]:
        """The last load progress of the workers that load or have loaded."""
        if loading:
            return [r.pulse() for r in self.alive() if r.state is WorkerState.LOADING]
        return [r.pulse() for r in self.alive() if not r.is_coming]

    def misfit(self, name: str, members: Collection[Member]) -> str | None:
        """Why a worker that has registered cannot serve with the others, if it cannot.

        The members of the newest generation are the measure; before the first, all workers.
        """
        names = {m.name for m in members}
        others = [r for r in self.alive() if r.build is not None and r.name != name]
        measure = [r for r in others if r.name in names] or others
        build = self._records[name].build
        if not measure or build is None or measure[0].build is None or name in names:
            return None
        return differing_item(measure[0].name, measure[0].build, name, build)

    def lose(self, name: str, reason: str, state: WorkerState = WorkerState.LOST) -> None:
        """A worker is lost; the controller expects nothing more from it."""
        self._records[name].enter(state, reason)
        self._status_pending.discard(name)

    # ---- numbers of this moment -----------------------------------------------------------

    def ask_status(self) -> tuple[StatusRequest, list[str]]:
        """A new request, and the workers that must answer it."""
        self._status_token += 1
        asked = [r.name for r in self.alive() if r.state is not WorkerState.STARTING]
        self._status_pending = set(asked)
        return StatusRequest(token=self._status_token), asked

    def take_status(self, name: str, reply: StatusReply) -> None:
        """A worker's answer; a late one still updates its numbers."""
        self._records[name].take_numbers(reply)
        if reply.token == self._status_token:
            self._status_pending.discard(name)

    @property
    def status_complete(self) -> bool:
        """All workers that were asked have answered, or are lost."""
        return not self._status_pending

    # ---- what they have in common ---------------------------------------------------------

    def learn_model(self, record: WorkerRecord) -> None:
        """Take the model's facts from an attention worker that is ready."""
        if record.member.runs_attention:
            self.model.update({k: record.info[k] for k in MODEL_FACTS if k in record.info})

    def holders(self) -> list[str | None]:
        """``[device]`` -> name of the worker that holds its experts; None for a lost one."""
        alive = {device: r.name for device, r in self._by_device() if not r.is_lost}
        devices = 1 + max((device for device, _ in self._by_device()), default=-1)
        return [alive.get(device) for device in range(devices)]

    def domains(self) -> list[str]:
        """``[device]`` -> failure domain of the worker that holds its experts."""
        of = {device: r.member.domain or r.member.node for device, r in self._by_device()}
        return [of.get(device, "") for device in range(len(self.holders()))]

    def _by_device(self) -> list[tuple[int, WorkerRecord]]:
        """Workers that hold or held experts; in local mode the attention worker."""
        found = [(r.member.device, r) for r in self if r.member.holds_experts]
        return found or [(0, r) for r in self]
