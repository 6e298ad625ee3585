"""A leader that loses the proposals of another rank, on simulated time; prints what is broken.

No edge breaks, no worker is silent, and no loop stalls: only the steps that are wanted do not come.
"""

from __future__ import annotations

import sys
from unittest import mock

from tests.simulation.scenario import draw_scenario
from tests.simulation.shrinking import outcome_of
from tests.simulation.world import World
from workers.engine.step_channel import StepChannel
from workers.engine.step_proposals import StepProposals

FIRST_LOST = 20
"""Proposals that arrive; the later ones of the first generation are lost."""


def outcome(seed: int) -> str:
    """Run a seed without other faults; what is broken, empty if nothing is."""
    world, taken, real = World(draw_scenario(seed, (), ())), [], StepChannel._take_proposals
    world.faults.guilty = {f"attention-{rank}": "the leader loses proposals" for rank in range(4)}

    def take(self: StepChannel, proposals: StepProposals, child: str) -> None:
        taken.append(proposals)
        if proposals.generation > 1 or len(taken) <= FIRST_LOST:
            real(self, proposals, child)

    with mock.patch.object(StepChannel, "_take_proposals", take):
        found = outcome_of(world)
    assert len(taken) > FIRST_LOST, "the seed has too few steps"
    return found


if __name__ == "__main__":
    for seed in range(int(sys.argv[1])):
        sys.stdout.write(outcome(seed))
