"""A group of workers on this host, without Ray."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

from benchmarks.harness.members import members_of
from cluster.actors.worker_group import WorkerGroup
from cluster.config.resources import NodeResources
from cluster.config.workers import WorkersSection
from cluster.core.errors import SupersededError
from cluster.core.topology import Member
from cluster.sizing.start_plan import ExistingWorker, StartPlan


class LocalWorkerGroup(WorkerGroup):
    """``WorkerGroup`` on this host without Ray; subclasses start and end the workers."""

    def __init__(self) -> None:
        self.restarted = False
        self.newest_term = 0
        self.claimed = 0, ""
        """Newest term, and the controller that has claimed it."""
        self.on_leaving_nodes: list[str] = []
        self.has_ended_controller = False
        self.released: list[str] = []
        """Places whose room was given back."""
        self.reserved: set[str] = set()
        """Places that were added and have room."""

    @abstractmethod
    def names(self) -> list[str]:
        """Workers that were started and not ended."""

    def resources(self) -> tuple[NodeResources, ...]:
        return (NodeResources(node_id="here", address="127.0.0.1", cpus=2.0),)

    def added_places(self) -> set[str]:
        return self.reserved

    def draining_nodes(self) -> frozenset[str]:
        return frozenset(f"node of {name}" for name in self.on_leaving_nodes)

    def node_ids_by_worker(self) -> dict[str, str]:
        return {name: f"node of {name}" for name in self.names()}

    def address(self) -> str:
        return "127.0.0.1"

    async def claim(self, identity: str) -> int:
        self.newest_term += 1
        self.claimed = self.newest_term, identity
        return self.newest_term

    async def check_term(self) -> None:
        if self.newest_term > self.claimed[0]:
            raise SupersededError(f"term {self.newest_term} is claimed")

    def reserve(self, workers: WorkersSection, limit_s: float) -> tuple[Member, ...]:
        return members_of(workers.pools)

    @abstractmethod
    async def start(self, members: Sequence[Member], plan: StartPlan, address: str) -> None:
        """See ``WorkerGroup``."""

    async def watch_creation(self, names: Sequence[str], on_process: Callable[[str], None]) -> None:
        return None

    async def watch(
        self, is_connected: Callable[[str], bool], on_died: Callable[[str, str], None]
    ) -> None:
        return None

    def was_restarted(self) -> bool:
        return self.restarted

    def call_back(self, method: str) -> None:
        return None

    def end_this_process(self) -> None:
        self.has_ended_controller = True

    async def find(self, limit_s: float) -> tuple[ExistingWorker, ...]:
        raise NotImplementedError

    async def release(self, places: Sequence[str]) -> None:
        self.released += places

    async def redirect(self, name: str, control_address: str) -> None:
        raise NotImplementedError

    @abstractmethod
    async def end(self, names: Sequence[str]) -> None:
        """See ``WorkerGroup``."""

    async def end_all(self) -> None:
        await self.end(self.names())
