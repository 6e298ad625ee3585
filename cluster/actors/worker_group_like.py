"""The interface of ``worker_group`` to the controller actor, which tests replace by a fake."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.actors.start_plan import StartPlan
from cluster.config.cluster import ClusterConfig, WorkersSection
from cluster.config.resources import NodeResources
from cluster.core.topology import Member


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundWorker:
    """A worker of an earlier controller."""

    name: str
    config: ClusterConfig
    """The cluster's configuration, shares resolved."""
    num_slots: int
    """Expert slots per bank; 0 where it holds no experts."""
    has_called: bool = True
    """It has called a controller, and so may have been in a generation."""


class WorkerGroupLike(Protocol):
    """The interface of ``cluster.actors.worker_group.WorkerGroup``."""

    silent: Collection[str]
    """Workers of an earlier controller that live, or may live, and did not answer ``find``."""

    def resources(self) -> tuple[NodeResources, ...]:
        """Live nodes."""

    def leaving(self) -> list[str]:
        """Workers on nodes that will leave."""

    def free_cpus(self) -> float:
        """Free CPUs."""

    def address(self) -> str:
        """Interface that the control server binds to."""

    async def claim(self, identity: str) -> int:
        """Claim a term for this controller, above all before; workers are ended in its name."""

    def reserve(self, workers: WorkersSection, limit_s: float) -> tuple[Member, ...]:
        """Find room, rank the workers. Blocks; use a thread."""

    async def start(self, members: Sequence[Member], plan: StartPlan, address: str) -> None:
        """Create workers: those of a start, later some in the room of lost ones.

        Raises ``SupersededError``.
        """

    async def watch_creation(self, names: Sequence[str], on_process: Callable[[str], None]) -> None:
        """Report those of the workers that ``start`` creates whose processes run; cancel it then.

        A constructor may still run; a worker that waits for room has no process.
        """

    async def watch(
        self, is_connected: Callable[[str], bool], on_died: Callable[[str, str], None]
    ) -> None:
        """Report workers that die before they have called."""

    def was_restarted(self) -> bool:
        """Whether an earlier controller may have left workers."""

    def call_back(self, method: str) -> None:
        """Make Ray call a method of this actor soon."""

    async def find(self, limit_s: float) -> tuple[FoundWorker, ...]:
        """The workers of an earlier controller."""

    def names(self) -> list[str]:
        """Workers that were started or found, answering or not, and not ended."""

    async def redirect(self, name: str, control_address: str) -> None:
        """Send a found worker the controller's new address. Raises ``SupersededError``."""

    async def end(self, names: Sequence[str]) -> None:
        """End these workers. Raises ``SupersededError``."""

    async def end_all(self) -> None:
        """End all workers and free their room."""
