"""Steps that fail at random places of the transport, and the new generation that each one causes.

A failing call raises what a broken edge raises. The worker reports it to the controller, and the
members stay the same: before the controller would declare the named peer lost, the test makes it
begin a new generation with all of them, as in a recovery.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from torch import Tensor

from benchmarks.harness.serving_cluster import ThreadCluster, ThreadWorkerGroup
from cluster.core.errors import PeerLostError
from cluster.core.states import ClusterState
from cluster.core.topology import Generation, Member
from workers.cuda.step_graph import StepGraph
from workers.model.config import BankSpec
from workers.process.worker.worker import Worker
from workers.process.worker_args import WorkerArgs
from workers.requests.step_header import StepHeader
from workers.transport.peer_connections import PeerConnections
from workers.transport.transport import DataTransport, ExpectedMessage, RowMessage, Tag


@dataclass(frozen=True, slots=True)
class Fault:
    """Where a step fails."""

    worker: str
    """On which worker."""
    bank: int
    """At which bank."""
    micro_batch: int
    """At which micro-batch; there may be no such one, or no rows in it: then nothing fails."""
    call: str
    """In ``post`` or ``receive``."""
    is_before: bool
    """Before the call does its work, or after it."""


class Faults:
    """Which steps fail where: a function of the seed, the generation and the step alone."""

    def __init__(self, banks: Sequence[BankSpec], rate: float, seed: int) -> None:
        self._num_banks = len(banks)
        self._rate = rate
        self._seed = seed
        self._lock = threading.Lock()
        self.is_armed = False
        """Nothing fails before this is set."""
        self.seen: Counter[Fault] = Counter()
        """Faults that happened."""
        self.steps: set[tuple[int, int]] = set()
        """(generation, step) that failed."""
        self.on_fault: Callable[[int], None] = lambda generation: None
        """Called with the generation that stops."""

    def of(self, header: StepHeader, workers: Sequence[str]) -> Fault | None:
        """The fault of a step, the same for every worker that asks."""
        draw = random.Random(f"{self._seed}/{header.generation}/{header.step}")
        if not self.is_armed or draw.random() >= self._rate:
            return None
        return Fault(
            worker=draw.choice(workers),
            bank=draw.randrange(self._num_banks),
            micro_batch=draw.randrange(header.num_micro_batches),
            call=draw.choice(("post", "receive")),
            is_before=draw.random() < 0.5,
        )

    def note(self, fault: Fault, header: StepHeader) -> None:
        """It happens."""
        with self._lock:
            self.seen[fault] += 1
            self.steps.add((header.generation, header.step))
        self.on_fault(header.generation)


class FailingTransport:
    """``DataTransport`` of one worker."""

    def __init__(self, inner: DataTransport, me: str, faults: Faults) -> None:
        self._inner = inner
        self.sums_are_rounded = inner.sums_are_rounded
        self._me = me
        self._faults = faults
        self._members: tuple[Member, ...] = ()
        self._header: StepHeader | None = None
        self._fault: Fault | None = None

    def begin_step(self, header: StepHeader) -> None:
        self._header = header
        fault = self._faults.of(header, [m.name for m in self._members])
        self._fault = fault if fault is not None and fault.worker == self._me else None
        self._inner.begin_step(header)

    def post(self, tag: Tag, messages: Sequence[RowMessage], *, sized: bool) -> None:
        self._fail(tag, "post", True)
        self._inner.post(tag, messages, sized=sized)
        self._fail(tag, "post", False)

    def receive(
        self, tag: Tag, expected: Sequence[ExpectedMessage], *, sized: bool, must_wait: bool
    ) -> list[tuple[Tensor, ...]]:
        self._fail(tag, "receive", True)
        received = self._inner.receive(tag, expected, sized=sized, must_wait=must_wait)
        self._fail(tag, "receive", False)
        return received

    def finish_step(self) -> None:
        self._inner.finish_step()

    def finish_later(self) -> Callable[[], None]:
        return self._inner.finish_later()

    def confirm_step(self) -> None:
        self._inner.confirm_step()

    def await_confirmation(self) -> None:
        self._inner.await_confirmation()

    @property
    def captured_state(self) -> Hashable:
        return self._inner.captured_state

    def capture(self, graph: StepGraph) -> None:
        """Faults are those of messages that the host sends."""

    def direct(self, ranks: Sequence[int]) -> None:
        """Faults are those of the calls above."""

    def reject(self, rank: int, reason: str) -> NoReturn:
        self._inner.reject(rank, reason)

    def apply_generation(self, generation: Generation) -> None:
        self._members = generation.members
        self._inner.apply_generation(generation)

    def close(self) -> None:
        self._inner.close()

    def _fail(self, tag: Tag, call: str, is_before: bool) -> None:
        fault, header = self._fault, self._header
        place = (tag.bank, tag.micro_batch, call, is_before)
        if fault is None or place != (fault.bank, fault.micro_batch, fault.call, fault.is_before):
            return
        assert header is not None
        self._fault = None
        self._faults.note(fault, header)
        peer = next(m.name for m in self._members if m.name != self._me)
        raise PeerLostError(peer, f"injected at {fault}")


class FailingWorker(Worker):
    """A worker whose transport fails."""

    faults: Faults
    """Set before the start."""

    def open_transport(self, connections: PeerConnections) -> DataTransport:
        inner = super().open_transport(connections)
        return FailingTransport(inner, self.member.name, self.faults)


class FailingWorkerGroup(ThreadWorkerGroup):
    """Threads whose transports fail."""

    def __init__(self, faults: Faults) -> None:
        super().__init__(FailingWorker)
        self._faults = faults

    def make_worker(self, args: WorkerArgs) -> Worker:
        worker = super().make_worker(args)
        assert isinstance(worker, FailingWorker)
        worker.faults = self._faults
        return worker


def renew_on_fault(cluster: ThreadCluster, faults: Faults) -> None:
    """From now on every fault ends in a new generation of the same members."""

    def renew(generation: int) -> None:
        known = cluster.controller.cluster
        if known.state is ClusterState.SERVING and known.generation.number == generation:
            cluster.actor.runner.handle_event(partial(known.reform, "a fault"))

    def on_fault(generation: int) -> None:
        cluster.loop.call_soon_threadsafe(renew, generation)

    faults.on_fault = on_fault
