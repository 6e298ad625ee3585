"""Measures of placements: balance, windows of changing load, decode steps, rows of a token."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from benchmarks.placement.data import Floats, Ints, draw, profile
from benchmarks.placement.random_plan import random_plan, siblings
from cluster.core.placement import BankPlacement, ExpertPlacement
from cluster.planner import eplb, mesh
from cluster.planner.assess import contiguous_plan
from cluster.planner.base import Plan, PlannedTopology, PlanOptions

PLANNERS: dict[str, Callable[..., Plan]] = {
    "contiguous": contiguous_plan,
    "random": random_plan,
    "EPLB": eplb.plan,
    "mesh": mesh.plan,
}


def bound(load: Floats, devices: int, redundant: int) -> float:
    """Best balancedness of any placement with equal slots and ideal copies."""
    count: Floats = np.ones(len(load))
    for _ in range(devices * redundant):
        count[int((load / count).argmax())] += 1
    mean: float = float(load.sum()) / devices
    return mean / max(mean, float((load / count).max()))


def over_bound(plan: Plan, loads: Floats, devices: int, redundant: int) -> list[float]:
    """Balancedness of each layer divided by its bound."""
    bounds = [bound(load, devices, redundant) for load in loads]
    return [b / limit for b, limit in zip(plan.balancedness, bounds, strict=True)]


def eplb_siblings(loads: Floats, devices: int, redundant: int) -> float:
    """Fraction of EPLB's spare slots whose expert has another copy on the same device."""
    slots = loads.shape[1] + devices * redundant
    slots = -(-slots // devices) * devices
    maps = eplb.rebalance(loads, num_slots=slots, num_devices=devices)
    beside = sum(siblings(row.reshape(devices, -1).tolist()) for row in maps)
    return float(beside / (len(loads) * (slots - loads.shape[1])))


def num_siblings(placement: ExpertPlacement) -> int:
    """Number of slots whose expert has another copy on the same device."""
    return sum(siblings(bank.physical_to_logical) for bank in placement.banks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Result of the plan for one window of load."""

    balancedness: float
    """Mean over the layers, under the load of the window, after the plan."""
    moved: float
    """Fraction of the slots that the plan moved."""


def follow(
    loads: Iterable[Floats], start: Floats, topology: PlannedTopology, fractions: Iterable[float]
) -> list[Window]:
    """Plan for each window with its limit of moves, starting from the placement before."""
    placement = mesh.plan(profile(start), topology).placement
    windows = []
    for load, fraction in zip(loads, fractions, strict=False):
        options = PlanOptions(max_move_fraction=fraction)
        plan = mesh.plan(profile(load), topology, placement, options)
        placement = plan.placement
        mean = statistics.mean(plan.balancedness)
        windows.append(Window(balancedness=mean, moved=plan.move_fraction))
    return windows


def follow_eplb(loads: Iterable[Floats], start: Floats, topology: PlannedTopology) -> list[Window]:
    """Plan for each window with EPLB, which has no limit of moves."""
    placement = eplb.plan(profile(start), topology).placement
    windows = []
    for load in loads:
        plan = eplb.plan(profile(load), topology, placement)
        placement = plan.placement
        mean = statistics.mean(plan.balancedness)
        windows.append(Window(balancedness=mean, moved=plan.move_fraction))
    return windows


def noise(base: Floats, windows: int, seed: int = 0) -> list[Floats]:
    """Loads of windows that are the base with independent 10% lognormal noise."""
    generator = np.random.default_rng(seed)
    return [base * np.exp(0.1 * generator.normal(size=base.shape)) for _ in range(windows)]


def walk(base: Floats, windows: int, seed: int = 0) -> list[Floats]:
    """Loads of windows, each with 10% lognormal noise on the window before."""
    generator = np.random.default_rng(seed)
    steps = 0.1 * generator.normal(size=(windows, *base.shape))
    return list(base * np.exp(steps.cumsum(0)))


def drift(base: Floats, other: Floats, windows: int, part: float = 0.1) -> list[Floats]:
    """Loads of windows, each closer by ``part`` to another load than the window before."""
    return [other + (base - other) * (1 - part) ** (i + 1) for i in range(windows)]


def decode_batches(load: Floats, rows: int, count: int) -> Ints:
    """Sampled experts [count, rows, 8] of ``count`` decode steps with ``rows`` rows."""
    generator = np.random.default_rng(0)
    return draw(np.tile(load, (count * rows, 1)), generator).reshape(count, rows, -1)


def decode_ratio(batches: Ints, bank: BankPlacement, hashed: bool = False) -> float:
    """Mean ratio of the busiest device's activated slots to ceil(distinct experts / devices).

    With ``hashed`` every row uses a random copy of its expert, as without decode devices.
    """
    count = len(batches)
    chosen = batches.reshape(count, -1)
    home = np.array(bank.decode_device)
    device = _picked_copies(chosen, bank) if hashed else home[chosen]
    batch = np.arange(count)[:, None]
    active = np.zeros((count, bank.num_experts, bank.num_devices), dtype=bool)
    active[batch, chosen, device] = True
    distinct = active.any(2).sum(1)
    return float((active.sum(1).max(1) / np.ceil(distinct / bank.num_devices)).mean())


def _picked_copies(chosen: Ints, bank: BankPlacement) -> Ints:
    """For each row and expert, a random device with a copy of the expert."""
    copies = [[d for d, _ in bank.logical_to_physical(e)] for e in range(bank.num_experts)]
    table = np.zeros((bank.num_experts, max(map(len, copies))), dtype=np.int64)
    for expert, places in enumerate(copies):
        table[expert, : len(places)] = places
    count = np.array([len(places) for places in copies])
    pick = np.random.default_rng(1).integers(1 << 30, size=chosen.shape) % count[chosen]
    return np.asarray(table[chosen, pick])


def rows_a_token(bank: BankPlacement, routes: Ints, seed: int = 0) -> float:
    """Mean number of devices that a token is sent to, with copies chosen by split weights."""
    generator = np.random.default_rng(seed)
    copies = [bank.logical_to_physical(e) for e in range(bank.num_experts)]
    width = max(map(len, copies))
    device = np.zeros((bank.num_experts, width), dtype=np.int64)
    ends = np.full((bank.num_experts, width), np.inf)
    for e, places in enumerate(copies):
        shares = np.cumsum([bank.split[d][s] for d, s in places])
        device[e, : len(places)] = [d for d, _ in places]
        ends[e, : len(places) - 1] = shares[:-1]
    pick = (generator.random(routes.shape)[..., None] >= ends[routes]).sum(-1)
    chosen = np.sort(device[routes, pick], axis=1)
    return float(1 + (chosen[:, 1:] != chosen[:, :-1]).sum(1).mean())


def speed() -> tuple[float, float]:
    """CPU seconds of a plan without an earlier placement and of one with it, in a new process.

    128 experts x 61 layers x 64 devices, one thread; medians.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.placement_speed"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    run.check_returncode()
    full, incremental = map(float, run.stdout.split())
    return full, incremental
