"""Idle workers that are cut off, on simulated time; prints what became of them, as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager

from tests.simulation.nodes import HEAD
from tests.simulation.patches import replaced
from tests.simulation.ray import Hosts
from tests.simulation.scenario import draw_scenario
from tests.simulation.world import World

IDLE_S = 5.0
CUT_S = 15.0
NODE_LIMIT_S = 6.0
"""Silence after which a node is dead to Ray, if its word counts."""
HEAL_S = 10.0


@contextmanager
def idle_world(num_attention: int, node_limit_s: float = math.inf) -> Iterator[World]:
    """A cluster without requests, some time after its start."""
    scenario = dataclasses.replace(
        draw_scenario(0, (), ()),
        num_attention=num_attention,
        num_experts=2,
        hosts=Hosts.MANY,
        asks=(),
        slowness=1.0,
        preemption=0.0,
        node_limit_s=node_limit_s,
        may_move=False,
    )
    world = World(scenario)
    with replaced(world.kernel, world.net):
        world._start()
        world._run_until(world.kernel.now + IDLE_S)
        yield world


def fenced_after_s(num_attention: int) -> float:
    """Time in which a leader is fenced that nothing reaches."""
    with idle_world(num_attention) as world:
        leader = world.ray.actors.workers["attention-0"]
        began = world.kernel.now
        world.faults._isolate(leader.process.host, CUT_S)
        world._run_until(began + CUT_S, lambda: leader.worker.membership.is_fenced)
        return world.kernel.now - began


def run_without_controller(num_attention: int) -> bool:
    """Whether all workers still run when the controller was out of reach for some time."""
    with idle_world(num_attention) as world:
        workers = [worker.worker for worker in world.ray.actors.workers.values()]
        world.faults._isolate(HEAD, CUT_S)
        world._run_until(world.kernel.now + CUT_S - 1.0)
        return all(worker.membership.is_running for worker in workers)


def ends_of_a_hold() -> tuple[float, int, int, bool]:
    """Ray loses the hosts of all workers while the controller holds them: when the first of them is
    lost, how many live on then and once Ray reaches them, and whether all places are filled again.
    """
    with idle_world(2, NODE_LIMIT_S) as world:
        before = list(world.ray.actors.workers.values())
        found = world.ray.controllers[0].actor.runner.controller
        assert found is not None
        records = [found.cluster.workers[worker.name] for worker in before]
        began = world.kernel.now
        world.faults._isolate(HEAD, CUT_S)
        world._run_until(began + CUT_S - 1.0, lambda: any(r.is_lost for r in records))
        lost_after_s = world.kernel.now - began
        world._run_until(began + CUT_S - 1.0)
        num_living = sum(not worker.is_dead for worker in before)
        world._run_until(began + CUT_S + HEAL_S)
        num_left = sum(not worker.is_dead for worker in before)
        return lost_after_s, num_living, num_left, world._serves(world.ray.controllers[0])


if __name__ == "__main__":
    found = {
        "fenced_after_s": [fenced_after_s(count) for count in (1, 2, 3, 12)],
        "run_without_controller": [run_without_controller(count) for count in (1, 2, 12)],
        "ends_of_a_hold": ends_of_a_hold(),
    }
    print(json.dumps(found))
