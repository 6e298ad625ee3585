"""Readiness while an expert worker stands still, and while it computes for long; prints what is
broken.

The detection limit is long, and silence is judged as with a GPU, so that no worker is lost: only
readiness tells what happens.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from unittest import mock

from cluster.config.cluster import ClusterConfig
from cluster.config.transport import TransportSection
from cluster.policy.silence import GapWindow
from tests.simulation.scenario import draw_scenario
from tests.simulation.shrinking import outcome_of
from tests.simulation.worker import SimWorker
from tests.simulation.world import Broken, World

_BEGIN_S = 3.0
"""Time from which on it may begin, as soon as steps run."""
LASTS_S = 6.0
FALL_S = 2.0
"""Time in which readiness falls, and in which it rises."""
_LOOK_S = 0.05


class StandingWorld(World):
    """Once requests run, the expert worker of rank 1 stands still, or computes for long."""

    def __init__(self, seed: int, *, computes: bool) -> None:
        super().__init__(draw_scenario(seed, ()))
        self.computes = computes
        self.stood_at = 0.0
        """When it began; 0 before."""
        self.num_looks = 0
        """Looks at gateways whose steps stand still by then."""

    def _config(self) -> ClusterConfig:
        transport = TransportSection(detection_limit_s=5 * LASTS_S)
        return dataclasses.replace(super()._config(), transport=transport)

    def _start(self) -> None:
        super()._start()
        self.kernel.after(_BEGIN_S, self._stand_still)

    def _check(self) -> None:
        super()._check()
        if not self.gateways or not self._began_at:
            return
        stood_s = self.kernel.now - self.stood_at if self.stood_at else 0.0
        name = self._expert().name
        for gateway in self.gateways:
            reasons = gateway._gateway.readiness.not_ready_reasons()
            must_be_ready = self.computes or not stood_s or stood_s > LASTS_S + FALL_S
            if must_be_ready and reasons:
                raise Broken(f"{stood_s:.2f} s: not ready: {reasons}")
            if not must_be_ready and FALL_S < stood_s < LASTS_S:
                self.num_looks += 1
                if reasons != [f"steps wait for expert rank 1 ({name})"]:
                    raise Broken(f"{stood_s:.2f} s: reasons {reasons}, not {name}")

    def _stand_still(self) -> None:
        """Begin when steps run: an idle cluster waits for nobody."""
        process = self._expert().process
        if not self._is_busy():
            self.kernel.after(_LOOK_S, self._stand_still)
            return
        self.stood_at = self.kernel.now
        if self.computes:
            self._expert().worker.activity.cpu_s = self.kernel.monotonic
            process.stall_s += LASTS_S
        else:
            process.pause()
            self.kernel.after(LASTS_S, process.resume)

    def _is_busy(self) -> bool:
        return any(
            worker.worker.activity.wants_rows
            for worker in self.ray.actors.workers.values()
            if worker.args.member.runs_attention
        )

    def _expert(self) -> SimWorker:
        return self.ray.actors.workers["expert-1"]


def outcome(seed: int, *, computes: bool) -> str:
    """Run a seed; what is broken, empty if nothing is."""
    world = StandingWorld(seed, computes=computes)
    with (
        mock.patch("workers.metrics.activity.ROW_LIMIT_S", 2 * LASTS_S),
        mock.patch.object(GapWindow, "patience_s", math.inf),
    ):
        found = outcome_of(world)
    if not found and not world.stood_at:
        return "no step ran"
    if not found and not computes and not world.num_looks:
        return "nobody looked while it stood still"
    return found and f"seed {seed}, computes={computes}: {found}\n"


if __name__ == "__main__":
    for number in range(int(sys.argv[1])):
        for kind in (False, True):
            sys.stdout.write(outcome(number, computes=kind))
