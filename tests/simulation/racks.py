"""The loss of a rack, on simulated time; prints what it has cost, as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from gateway.core.replay import ReplayCause
from tests.simulation.ray import Hosts
from tests.simulation.scenario import Fault, Scenario, draw_scenario, enlarged
from tests.simulation.shrinking import outcome_of
from tests.simulation.world import World

_LOSS_S = 4.0
_LOOK_S = 0.1
_AWAY_S = 9.0
"""Time for which a rack is cut off: its workers are removed, and others are added when it is back.
"""
_NODE_LIMIT_S = 2.0


def _scenario(seed: int, fault: Fault, num_attention: int, num_experts: int) -> Scenario:
    drawn = replace(draw_scenario(seed, (), ()), faults=(fault,), autoscales=False)
    return replace(enlarged(drawn, num_attention, num_experts), moves_experts=False, may_move=False)


def loss_of_half(seed: int) -> dict[str, Any]:
    """What the loss of half of the expert workers costs: kills, writes and replays."""
    fault = Fault(at_s=_LOSS_S, kind="kill_half", where=seed)
    world = World(replace(_scenario(seed, fault, 2, 8), hosts=Hosts.MIXED))
    problem, (loss,) = outcome_of(world), world.faults.domains.losses
    counts = (g._gateway.metrics.requests_replayed for g in world.gateways)
    replays = [c.labels(cause.value)._value.get() for c in counts for cause in ReplayCause]
    return {
        "problem": problem,
        "num_lost": len(loss.names),
        "was_covered": loss.was_covered,
        "num_writes": loss.num_writes,
        "num_replays": sum(replays),
        "num_failed": sum(
            not (o.is_right or o.has_left or o.is_late) for o in world.clients.outcomes
        ),
    }


def return_of_a_rack(seed: int) -> dict[str, Any]:
    """Experts at risk over time when a rack leaves the cluster and another one joins."""
    fault = Fault(at_s=_LOSS_S, kind="isolate_domain", lasts_s=_AWAY_S)
    scenario = replace(
        _scenario(seed, fault, 2, 4),
        hosts=Hosts.MANY,
        moves_experts=True,
        node_limit_s=_NODE_LIMIT_S,
        num_steps=1500,
    )
    world, counts = World(scenario), list[int]()

    def look() -> None:
        counts.append(world.faults.domains.num_at_risk())
        world.kernel.after(_LOOK_S, look)

    world.kernel.after(_LOOK_S, look)
    return {"problem": outcome_of(world), "at_risk": list(_changes(counts))}


def _changes(counts: list[int]) -> Iterator[int]:
    for before, count in zip([-1, *counts], counts, strict=False):
        if count != before:
            yield count


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"loss": loss_of_half(0), "return": return_of_a_rack(0)}))
