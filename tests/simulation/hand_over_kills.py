"""Kills of each kind of process in each phase of a hand-over between the step groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

from gateway.engines.assignment_queue import AssignmentQueue
from gateway.engines.engine_client import EngineClient
from gateway.engines.hand_overs import HandOvers
from tests.simulation.kernel import Process
from workers.engine.step_tree import StepTree
from workers.requests.wire import Prefetched

if TYPE_CHECKING:
    from tests.simulation.scenario import Fault
    from tests.simulation.worker import SimWorker
    from tests.simulation.world import World

PHASES = ("asked", "fetched blocks", "paused", "moved", "before the step", "decoded")
VICTIMS = (
    *("prefill", "decode", "expert", "prefill leader", "decode leader", "controller", "gateway"),
)
_BEFORE_STEP_S = 0.02
"""Longest time from the move of a request to a kill before its first step there."""


@dataclass(frozen=True, slots=True)
class HandOver:
    """A hand-over in some phase."""

    gateway: Process | None
    source: str
    """Name of the prefill worker."""
    target: str
    """Name of the decode worker."""


class HandOverKills:
    """Waits for phases, and kills.

    Args:
        world: the world.
        kill: kills a worker, a gateway, or the controller (None), unless the cluster would be lost.
    """

    def __init__(self, world: World, kill: Callable[[Process | None], None]) -> None:
        self._world = world
        self._kill = kill
        self._awaited: list[tuple[str, Fault]] = []
        self.done: Counter[str] = Counter()
        """Kills by victim and phase."""

    def wait(self, fault: Fault) -> None:
        """Kill when a hand-over comes to the fault's phase."""
        self._awaited.append((PHASES[fault.where % len(PHASES)], fault))

    def note(self, phase: str, source: str, target: str) -> None:
        """A hand-over has come to a phase."""
        process = self._world.kernel.process
        for one in [one for one in self._awaited if one[0] == phase]:
            self._awaited.remove(one)
            hand_over = HandOver(process, source, target)
            is_later = phase == "before the step"
            wait_s = _BEFORE_STEP_S * (one[1].other % 100) / 100 if is_later else 0.0
            self._world.kernel.after(wait_s, self._act, one[1], phase, hand_over)

    def _act(self, fault: Fault, phase: str, hand_over: HandOver) -> None:
        if self._world.faults.is_healed:
            return
        victim = VICTIMS[fault.other % len(VICTIMS)]
        found, process = self._find(victim, hand_over, fault.where)
        if found:
            self._world.kernel.log("the %s is killed: %s (%s)", victim, hand_over, phase)
            self._kill(process)
            self.done[f"{victim} killed: {phase}"] += 1

    def _find(self, victim: str, hand_over: HandOver, number: int) -> tuple[bool, Process | None]:
        """Return whether the victim lives, and its process; None for the controller."""
        if victim == "controller":
            return True, None
        if victim == "gateway":
            return hand_over.gateway is not None, hand_over.gateway
        actors = self._world.ray.actors
        workers = {name: w for name, w in actors.workers.items() if name in actors.alive}
        experts = sorted(name for name, w in workers.items() if w.args.member.holds_experts)
        name = hand_over.source if victim.startswith("prefill") else hand_over.target
        if victim == "expert":
            name = experts[number % len(experts)] if experts else ""
        worker = workers.get(name)
        if worker is not None and victim.endswith("leader"):
            worker = workers.get(_leader(worker))
        return worker is not None, None if worker is None else worker.process

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Notice all phases of all gateways within a block."""
        prefetch, move = EngineClient.prefetch, AssignmentQueue.move
        take, hand_over, settle = HandOvers.take, HandOvers._hand_over, HandOvers.settle

        def on_prefetch(client: EngineClient, entry: Any, source: EngineClient) -> None:
            prefetch(client, entry, source)
            if source.group == "prefill":
                self.note("asked", source.worker, client.worker)

        def on_take(self_: HandOvers, client: EngineClient, message: Any) -> None:
            coming = self_._coming.get(message.request_id)
            if isinstance(message, Prefetched) and coming is not None:
                stream = coming[0].stream
                if isinstance(stream, EngineClient):
                    self.note("fetched blocks", stream.worker, coming[1].worker)
            take(self_, client, message)

        def on_hand_over(self_: HandOvers, entry: Any, source: EngineClient) -> None:
            hand_over(self_, entry, source)
            coming = self_._coming.get(entry.request.request_id)
            self.note("paused", source.worker, "" if coming is None else coming[1].worker)

        def on_move(
            self_: AssignmentQueue, entry: Any, target: Any, num_new: int, kv_peer: str = ""
        ) -> None:
            move(self_, entry, target, num_new, kv_peer)
            if target is not None and target.group == "decode":
                self.note("moved", kv_peer, target.worker)
                self.note("before the step", kv_peer, target.worker)

        def on_settle(self_: HandOvers, entry: Any, client: EngineClient) -> None:
            if entry.request.request_id in self_._coming and client.group == "decode":
                self.note("decoded", entry.kv_peer, client.worker)
            settle(self_, entry, client)

        with ExitStack() as held:
            for owner, name, real in (
                (EngineClient, "prefetch", on_prefetch),
                (HandOvers, "take", on_take),
                (HandOvers, "_hand_over", on_hand_over),
                (AssignmentQueue, "move", on_move),
                (HandOvers, "settle", on_settle),
            ):
                held.enter_context(mock.patch.object(owner, name, real))
            yield


def _leader(worker: SimWorker) -> str:
    return StepTree.of(worker.worker.membership.generation, worker.name).leader
