"""A new controller continues with running workers: its parts take the collected state."""

from __future__ import annotations

from cluster.controller.drain.drain import Draining
from cluster.controller.failover.collect import CollectedState, restore_workers
from cluster.controller.parts.cluster import Cluster, GenerationRound, Phase
from cluster.controller.parts.effects import End
from cluster.controller.parts.recovery import Recovery
from cluster.core.frames import GenerationReady


def continue_with(
    collected: CollectedState,
    cluster: Cluster,
    recovery: Recovery,
    draining: Draining,
    now: float,
) -> None:
    """Restore the state of a new controller, which then goes on."""
    memory = collected.memory
    cluster.history.restore(memory.history)
    restore_workers(cluster.workers, collected)
    cluster.round = GenerationRound(collected.generation, now)
    cluster.highest_epoch = collected.highest_epoch
    cluster.desired = memory.desired or cluster.desired
    gone = {r.name: r.reason for r in cluster.workers if r.is_lost}
    cluster.places.restore(memory.closed, gone, now)
    members = {m.name for m in collected.generation.members}
    for record in cluster.workers.alive():
        record.started_with = None if record.name in members else cluster.desired
    _take_answers(cluster.round, collected)
    _go_on(collected, cluster, recovery, now)
    recovery.ready(now)
    drain = memory.drain
    cluster.operations.restore(memory.operations, now, drain.operation.id if drain else None)
    draining.restore(drain, now)
    for name, greeting in collected.greetings.items():
        if greeting.asks_for_drain and not cluster.workers[name].is_lost:
            draining.requested(name, now)
    cluster.remember()


def _take_answers(newest: GenerationRound, collected: CollectedState) -> None:
    """The members' reports are answers to the newest generation."""
    for member in newest.members:
        greeting = collected.greetings.get(member.name)
        if greeting is not None and (report := greeting.report) is not None:
            newest.answers[member.name] = GenerationReady(
                generation=newest.number,
                highest_step=report.highest_step,
                highest_epoch=report.highest_epoch,
            )


def _go_on(collected: CollectedState, cluster: Cluster, recovery: Recovery, now: float) -> None:
    """With the newest generation if all its members run it, else with the next."""
    cause, workers = "the controller was restarted", cluster.workers
    missing = [
        m.name
        for m in collected.generation.members
        if m.name not in collected.greetings or workers[m.name].is_lost
    ]
    if collected.is_intact:
        cluster.experts_complete = True
        cluster.round.enter(Phase.RUNNING)
        recovery.show_running()
        cluster.history.add(cluster.round.number, now, cause, "all members went on")
    elif missing:
        cluster.history.add(cluster.round.number, now, cause, "not all members have called")
        for name in missing:
            if not workers[name].is_lost:
                workers.lose(name, "it did not call the restarted controller")
        cluster.remember()
        recovery.lost({n: workers[n].reason for n in missing}, now)
        cluster.effects.append(End(tuple(missing)))
    else:
        cluster.reform(cause, now)
