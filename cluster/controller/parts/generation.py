"""Forms and runs generations: a generation is announced, and runs when it is complete.

    begin ─▶ NewGeneration to every member ─▶ GenerationReady from all, their slots hold the maps'
        ─▶ RunGeneration(first step above the highest step of any member)

``Recovery`` decides on members and placement.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from cluster.controller.parts.cluster import Cluster
from cluster.controller.parts.generation_round import GenerationRound, Phase
from cluster.core.frames import NewGeneration, RunGeneration
from cluster.core.placement import ExpertPlacement
from cluster.core.states import WorkerState
from cluster.core.topology import Generation, Member


def begin(
    cluster: Cluster, members: Sequence[Member], placement: ExpertPlacement, now: float
) -> None:
    """Announce the next generation to all its members."""
    fresh = tuple(cluster.workers[m.name].member for m in members)
    generation = Generation(number=cluster.round.number + 1, members=fresh)
    cluster.round = GenerationRound(generation, now)
    if cluster.highest_epoch > cluster.placement.epoch:  # workers may know that epoch
        placement = replace(placement, epoch=max(cluster.highest_epoch + 1, placement.epoch))
    cluster.placement = placement
    cluster.touch()
    _stand_by(cluster)
    order = NewGeneration(
        term=cluster.term,
        controller=cluster.identity,
        generation=generation,
        placement=cluster.placement,
        drained=[r.name for r in cluster.workers if r.state is WorkerState.DRAINED],
    )
    for member in fresh:
        cluster.link.send(member.name, order)


def run(cluster: Cluster, now: float) -> bool:
    """Run the generation, whose members have all answered; whether it runs now."""
    formed = cluster.round
    if formed.highest_epoch > cluster.placement.epoch:
        # a survivor ran a later epoch than the controller knew; the new one must be higher
        placement = replace(cluster.placement, epoch=formed.highest_epoch + 1)
        begin(cluster, formed.members, placement, now)
        return False
    cluster.experts_complete = True
    formed.phase = Phase.RUNNING
    order = RunGeneration(generation=formed.number, first_step=formed.first_step)
    for member in formed.members:
        record = cluster.workers[member.name]
        record.progress_at = now
        record.enter(WorkerState.SERVING)
        cluster.link.send(member.name, order)
    return True


def stall(cluster: Cluster, members: Sequence[Member], now: float) -> None:
    """No generation can run: keep these members for a later one."""
    survivors = Generation(number=cluster.round.number, members=tuple(members))
    cluster.round = GenerationRound(survivors, now, Phase.STALLED)
    _stand_by(cluster)


def _stand_by(cluster: Cluster) -> None:
    """Serving members become ready: they run no steps until the next RunGeneration."""
    for member in cluster.round.members:
        record = cluster.workers[member.name]
        if record.state is WorkerState.SERVING:
            record.enter(WorkerState.READY)
