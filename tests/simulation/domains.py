"""Racks: their faults, and what the loss of one may cost a cluster with copies in two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from cluster.controller.cluster import Cluster
from cluster.core.states import ClusterState
from cluster.core.topology import Member
from cluster.load.view import num_at_risk
from cluster.policy.coverage import ExpertHoldings, FailureDecision, decide_members
from tests.simulation.kernel import Kernel

if TYPE_CHECKING:
    from tests.simulation.worker import SimWorker
    from tests.simulation.world import World


_REPLACE = {"scale", "drain_worker", "drain_node"}
"""Faults after which experts may have one copy."""


@dataclass(kw_only=True, slots=True)
class Loss:
    """A lost rack, and what became of the others until they went on."""

    generation: int
    """The one that ran with its workers."""
    names: frozenset[str]
    was_covered: bool
    """The others have a copy of each expert."""
    writes: dict[str, int] = field(default_factory=dict)
    """By name, writes into the slots of the others before the loss."""
    num_writes: int = -1
    """Writes into slots of the others until the next generation ran; -1: none ran yet."""


class Domains:
    """The racks of one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.losses: list[Loss] = []

    @property
    def cluster(self) -> Cluster | None:
        """What the controller knows, if there is one."""
        controller = self._world.ray.controller
        found = controller.actor.runner.controller if controller is not None else None
        return found.cluster if found is not None else None

    def hosts_of_last_rack(self) -> list[str]:
        """Hosts with living workers in a rack without Ray's head, which can be cut off."""
        rack = f"rack-{self._world.scenario.num_racks - 1}"
        hosts = (w.process.host for w in self._world.ray.actors.workers.values())
        return [h for h in dict.fromkeys(hosts) if self._world.ray.rack_of(h) == rack]

    def workers_of(self, number: int) -> list[SimWorker]:
        """Living workers of a rack."""
        rack = f"rack-{number % max(self._world.scenario.num_racks, 1)}"
        actors = self._world.ray.actors
        return [
            worker
            for name, worker in actors.workers.items()
            if name in actors.alive and self._world.ray.rack_of(worker.process.host) == rack
        ]

    def lose(self, gone: Sequence[SimWorker]) -> None:
        """Workers will die now."""
        cluster = self.cluster
        if cluster is None or not cluster.runs:
            return
        self.losses = [loss for loss in self.losses if loss.num_writes >= 0]
        names = frozenset(worker.name for worker in gone)
        others = [w for w in self._world.ray.actors.workers.values() if w.name not in names]
        living = {w.args.member.device for w in others if w.args.member.holds_experts}
        self.losses.append(
            Loss(
                generation=cluster.round.number,
                names=names,
                was_covered=all(
                    living.intersection(bank.holders(expert))
                    for bank in cluster.placement.banks
                    for expert in range(bank.num_experts)
                ),
                writes={w.name: self._world.kernel.num_writes[w.name] for w in others},
            )
        )

    def runs(self, number: int) -> None:
        """A generation runs; looked at whenever a worker begins to run one."""
        for loss in self.losses:
            if loss.num_writes < 0 and number > loss.generation:
                now = self._world.kernel.num_writes
                loss.num_writes = sum(now[name] - count for name, count in loss.writes.items())

    def problem(self) -> str:
        """What a loss has cost that it may not cost, in the end; empty if nothing has."""
        scenario = self._world.scenario
        kinds = {fault.kind for fault in scenario.faults}
        if self.num_at_risk() and self._all_are_where_they_began() and not kinds & _REPLACE:
            return f"{self.num_at_risk()} experts have all copies in one rack"
        if scenario.moves_experts or not kinds.issubset(("kill_half", "kill_domain")):
            return ""
        loads = (loss for loss in self.losses if loss.was_covered and loss.num_writes > 0)
        return next((f"experts were loaded without need: {loss}" for loss in loads), "")

    def num_at_risk(self) -> int:
        """Experts of a complete cluster with all copies in one rack; 0 for another cluster."""
        cluster = self.cluster
        if cluster is None or cluster.state is not ClusterState.SERVING:
            return 0
        holders = cluster.workers.by_device(cluster.placement.num_devices)
        domains = [r.member.domain or r.member.node if r else "" for r in holders]
        return sum(num_at_risk(bank, domains) for bank in cluster.placement.banks)

    def _all_are_where_they_began(self) -> bool:
        """No place was added or removed, and each worker is in the rack of its first one."""
        ray, scenario = self._world.ray, self._world.scenario
        if not scenario.num_racks or scenario.autoscales or scenario.hosts.are_followed:
            return False
        return all(
            ray.rack_of(w.process.host) == ray.rack_of(ray.host_of("expert", w.args.member.rank))
            for w in ray.actors.workers.values()
            if w.args.member.holds_experts
        )


def checked_decisions(kernel: Kernel) -> Callable[..., FailureDecision]:
    """``decide_members``, which must not load an expert that a member holds."""
    return partial(_decide, kernel)


def _decide(
    kernel: Kernel, members: Sequence[Member], holdings: ExpertHoldings, highest_epoch: int
) -> FailureDecision:
    decision = decide_members(members, holdings, highest_epoch)
    failed = {(f.bank, f.device, f.slot) for f in holdings.failed}
    for fill in decision.stage.fills if decision.stage is not None else ():
        for member in members:
            placed = holdings.joining.get(member.device) or holdings.current
            held = {
                expert
                for device, slot, expert in placed.banks[fill.bank].copies()
                if device == member.device and (fill.bank, device, slot) not in failed
            }
            if fill.expert in held:
                what = f"expert {fill.expert} of bank {fill.bank}"
                kernel.failures.append(f"{what} is loaded, and {member.name} holds it")
    return decision
