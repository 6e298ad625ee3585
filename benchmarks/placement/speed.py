"""CPU time of planning: prints the seconds of a full plan and of an incremental plan.

python -m benchmarks.placement_speed, with OMP_NUM_THREADS=1 for one thread
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np

from benchmarks.placement.data import dots_like, olmoe, profile
from cluster.planner import mesh
from cluster.planner.base import PlannedTopology, PlanOptions

REPEATS = 5
DEVICES = 64


def main() -> None:
    """Median CPU time of calls after one warm-up call."""
    generator = np.random.default_rng(0)
    topology = PlannedTopology.uniform(DEVICES, num_redundant=1)
    options = PlanOptions(max_move_fraction=0.02)
    base = dots_like(olmoe()["github"])
    placement = mesh.plan(profile(base, 6), topology).placement
    full, incremental = [], []
    for _ in range(REPEATS):
        now = profile(base * np.exp(0.1 * generator.normal(size=base.shape)), 6)
        start = time.process_time()
        mesh.plan(now, topology)
        middle = time.process_time()
        mesh.plan(now, topology, placement, options)
        full.append(middle - start)
        incremental.append(time.process_time() - middle)
    sys.stdout.write(f"{statistics.median(full):.4f} {statistics.median(incremental):.4f}\n")
