"""Quality of placements: the planner of expertmesh, EPLB, contiguous and random placements.

python -m benchmarks.run --only placement
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.placement import data, measures
from benchmarks.placement.data import Floats, Ints
from benchmarks.report.results import table
from cluster.planner import eplb, mesh
from cluster.planner.base import PlannedTopology
from cluster.sizing.replay import POLICIES, ExpertStepCost, simulate


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Sizes of the measurement."""

    devices: tuple[int, ...]
    """Numbers of devices for the 64 experts of OLMoE."""
    domains: tuple[str, ...]
    """Kinds of text."""
    windows: int
    """Windows of load in a row, each with one plan."""
    layers: int
    """Layers of the dots-like model."""
    tokens: int
    """Tokens from which the rows of a token are computed."""
    batches: int
    """Sampled decode batches of each layer."""
    devices_simulated: tuple[int, ...]
    """Numbers of devices for the simulation."""
    layers_simulated: int
    """Layers of the simulation."""
    windows_simulated: int
    """Windows of the simulation."""
    has_speed: bool
    """Whether planning is timed."""


FULL = Size(
    devices=(4, 8, 16, 32),
    domains=("c4", "github", "arxiv", "book", "wikipedia"),
    windows=20,
    layers=61,
    tokens=4000,
    batches=600,
    devices_simulated=(64, 128, 256),
    layers_simulated=4,
    windows_simulated=8,
    has_speed=True,
)
QUICK = Size(
    devices=(8,),
    domains=("github", "arxiv"),
    windows=2,
    layers=3,
    tokens=200,
    batches=4,
    devices_simulated=(64,),
    layers_simulated=1,
    windows_simulated=2,
    has_speed=False,
)


def section(quick: bool) -> str:
    """Return the Markdown section with all tables."""
    size = QUICK if quick else FULL
    parts: Sequence[Callable[[Size], str]] = (
        balance,
        held_out,
        windows,
        switch,
        decode,
        rows,
        simulation,
        speed,
    )
    head = (
        "## Expert placement\n\nR is the number of spare expert slots for each device and layer (1 "
        "unless a row names another number), G the number of devices, B the rows of a decode step. "
        "Balancedness is the mean load of the devices divided by the load of the busiest device. "
        "The planners: `contiguous` places experts in order, `random` at random, `EPLB` is "
        "DeepSeek's algorithm, `mesh` is the planner of expertmesh. The loads of OLMoE are router "
        "counts of three layers of OLMoE-1B-7B on five kinds of text."
    )
    return "\n\n".join([head, *(part(size) for part in parts)])


def balance(size: Size) -> str:
    """Plans without an earlier placement, for loads that were used to develop the planner."""
    olmoe = np.concatenate([data.olmoe()[d] for d in size.domains])
    lines = [_balance_row(f"OLMoE, G={g}", olmoe, g, 1) for g in size.devices]
    lines += [_balance_row(f"OLMoE, G={g}, R=2", olmoe, g, 2) for g in size.devices]
    dots = np.concatenate([data.dots_like(data.olmoe()[d], size.layers) for d in size.domains])
    lines.append(_balance_row(f"dots-like 128 x {size.layers}, G=64", dots, 64, 1))
    text = (
        "The bound is the best balancedness of any placement with these slots. A second copy of an "
        "expert on the same device is wasted: the last columns have the fraction of EPLB's spare "
        "slots with such copies, and their number in the plans of `mesh`. *dots-like* loads have "
        f"the 128 experts and {size.layers} layers of dots.llm1, and are composed of OLMoE's."
    )
    return _titled(
        "Balancedness relative to its bound, mean / worst layer", _BALANCE_HEAD, lines, text
    )


def held_out(size: Size) -> str:
    """The same plans for loads that were not used to develop the planner."""
    mixtral = np.concatenate([data.mixtral()[d] for d in size.domains])
    cases = [
        ("Mixtral counts, G=4", mixtral, 4),
        ("Mixtral counts, G=8", mixtral, 8),
        ("lognormal 0.5, 60 experts, G=12", data.lognormal(60, 0.5), 12),
        ("lognormal 1.0, 64 experts, G=16", data.lognormal(64, 1.0), 16),
        ("lognormal 1.0, 160 experts, G=40", data.lognormal(160, 1.0), 40),
        ("Zipf 0.7, 256 experts, G=32", data.zipf(256, 0.7), 32),
        ("Zipf 1.0, 100 experts, G=24", data.zipf(100, 1.0), 24),
        ("Dirichlet 0.5, 64 experts, G=16", data.dirichlet(64, 0.5), 16),
        ("Dirichlet 2, 128 experts, G=64", data.dirichlet(128, 2.0), 64),
    ]
    lines = [_balance_row(name, loads, g, 1) for name, loads, g in cases]
    return _titled(
        "The same for loads that were not used to develop the planner", _BALANCE_HEAD, lines
    )


_BALANCE_HEAD = ("case", *measures.PLANNERS, "wasted copies, EPLB", "wasted copies, mesh")


def _balance_row(name: str, loads: Floats, devices: int, redundant: int) -> list[str]:
    topology = PlannedTopology.uniform(devices, redundant)
    profile = data.profile(loads, min(data.TOP_K, loads.shape[1] // 4))
    cells = [name]
    for plan in (planner(profile, topology) for planner in measures.PLANNERS.values()):
        found = measures.over_bound(plan, loads, devices, redundant)
        cells.append(f"{statistics.mean(found):.3f} / {min(found):.3f}")
        last = plan
    beside = measures.eplb_siblings(loads, devices, redundant)
    return [*cells, f"{beside:.3f}", str(measures.num_siblings(last.placement))]


def windows(size: Size) -> str:
    """Small changes of load; a plan may move 2% of the slots for each (5% for a large change)."""
    following = zip(size.domains, size.domains[1:] + size.domains[:1], strict=True)
    pairs = [(data.olmoe()[domain], data.olmoe()[other]) for domain, other in following]
    made_up = [(data.lognormal(160, 1.0, 3, seed), data.zipf(160, 0.7, 3, seed)) for seed in (1, 2)]
    lines = []
    for g in size.devices:
        lines += [_window_row(size, f"G={g}", g, pairs, change) for change in _CHANGES]
    name = "not used in development, 160 experts, G=40"
    lines += [_window_row(size, name, 40, made_up, change) for change in _CHANGES]
    head = (
        "devices, change of load in each window",
        "mesh: balancedness, mean / worst window",
        "mesh: moved slots in a window, mean / most",
        "EPLB: balancedness, mean",
        "EPLB: moved slots, mean",
    )
    text = (
        "After each window of load, both planners plan for its load. `mesh` may move 2% of the "
        "slots, or 5% if the load drifts by 30%; EPLB has no such limit. The load changes by "
        "noise, or drifts towards the load of another kind of text. Rows with *once* have only one "
        "window."
    )
    return _titled(f"{size.windows} windows with changing load", head, lines, text)


_CHANGES = (
    ("10% noise", 0.0, 0.02),
    ("10% noise, accumulated", -1.0, 0.02),
    ("10% drift", 0.1, 0.02),
    ("30% drift, once", 0.3, 0.05),
)


def _window_row(
    size: Size,
    name: str,
    devices: int,
    pairs: Sequence[tuple[Floats, Floats]],
    change: tuple[str, float, float],
) -> list[str]:
    topology = PlannedTopology.uniform(devices, 1)
    label, part, fraction = change
    ours, theirs = [], []
    for seed, (base, other) in enumerate(pairs):
        count = 1 if part == 0.3 else size.windows
        if part > 0:
            loads = measures.drift(base, other, count, part)
        else:
            loads = (measures.walk if part < 0 else measures.noise)(base, count, seed)
        ours += measures.follow(loads, base, topology, [fraction] * count)
        theirs += measures.follow_eplb(loads, base, topology)
    return [f"{name}, {label}", *_window_cells(ours), *_window_cells(theirs, short=True)]


def _window_cells(found: Sequence[measures.Window], short: bool = False) -> list[str]:
    balance = [w.balancedness for w in found]
    moved = [w.moved for w in found]
    mean, share = statistics.mean(balance), statistics.mean(moved)
    if short:
        return [f"{mean:.3f}", f"{share:.1%}"]
    return [f"{mean:.3f} / {min(balance):.3f}", f"{share:.1%} / {max(moved):.1%}"]


def switch(size: Size) -> str:
    """The whole load changes to another kind of text in one window."""
    lines = []
    for g in size.devices:
        topology = PlannedTopology.uniform(g, 1)
        pairs = [
            measures.follow([data.olmoe()[b]] * 2, data.olmoe()[a], topology, (0.10, 0.06))
            for a in size.domains
            for b in size.domains
            if a != b
        ]
        unmoved = [
            measures.follow([data.olmoe()[b]], data.olmoe()[a], topology, (0.0,))[0].balancedness
            for a in size.domains
            for b in size.domains
            if a != b
        ]
        cells = [f"G={g}", f"{statistics.mean(unmoved):.3f}"]
        for step in (0, 1):
            balance = [pair[step].balancedness for pair in pairs]
            moved = [sum(w.moved for w in pair[: step + 1]) for pair in pairs]
            cells.append(f"{statistics.mean(balance):.3f} / {min(balance):.3f}")
            cells.append(f"{statistics.mean(moved):.1%} / {max(moved):.1%}")
        lines.append(cells)
    head = (
        "devices",
        "no move: balancedness, mean",
        "first plan: balancedness, mean / worst pair",
        "first plan: moved slots, mean / most",
        "second plan: balancedness, mean / worst pair",
        "both plans: moved slots, mean / most",
    )
    text = (
        "The text changes at once, for all ordered pairs of kinds of text. `mesh` plans twice: the "
        "first plan may move 10% of the slots, the second one 6%. Without a move, only the shares "
        "of the copies change."
    )
    return _titled("Change to another kind of text", head, lines, text)


def decode(size: Size) -> str:
    """Activated slots of the busiest device in sampled decode batches."""
    loads = np.concatenate([data.olmoe()[d] for d in size.domains])
    totals: dict[int, list[list[float]]] = {rows: [] for rows in (16, 64, 256)}
    drawn = {
        rows: [measures.decode_batches(load, rows, size.batches) for load in loads]
        for rows in totals
    }
    lines = []
    for g in size.devices:
        profile = data.profile(loads)
        plans = (
            (eplb.plan(profile, PlannedTopology.uniform(g, 1)), True),
            (mesh.plan(profile, PlannedTopology.uniform(g)), False),
            (mesh.plan(profile, PlannedTopology.uniform(g, 1)), False),
            (mesh.plan(profile, PlannedTopology.uniform(g, 2)), False),
        )
        for rows_a_step, all_rows in totals.items():
            values = [
                statistics.mean(
                    measures.decode_ratio(batches, bank, hashed)
                    for batches, bank in zip(drawn[rows_a_step], plan.placement.banks, strict=True)
                )
                for plan, hashed in plans
            ]
            all_rows.append(values)
            lines.append([f"G={g}, B={rows_a_step}", *(f"{v:.3f}" for v in values)])
    for rows_a_step, all_rows in totals.items():
        means = np.mean(all_rows, axis=0)
        lines.append([f"mean over G, B={rows_a_step}", *(f"{v:.3f}" for v in means)])
    head = ("case", "EPLB, R=1, random copy", "mesh, R=0", "mesh, R=1", "mesh, R=2")
    text = (
        "The time of a decode step grows with the activated slots of the busiest device, as each "
        "is read from memory. The table divides their number by the least possible number, "
        "ceil(different experts of the batch / G); 1 is ideal. With EPLB each row uses a random "
        "copy of its expert; with `mesh` all decode rows of an expert use one copy."
    )
    return _titled("Decode: activated slots of the busiest device", head, lines, text)


def rows(size: Size) -> str:
    """Number of devices that a token is sent to, with and without known co-activation."""
    lines = []
    for g in size.devices:
        if g == 32:  # two experts on a device: almost nothing to group
            continue
        found = [_rows_of(counts, g, size.tokens) for counts in data.token_rows().values()]
        means = np.mean(found, axis=0).tolist()
        less = 1 - means[4] / means[0]
        lines.append([f"G={g}", *(f"{v:.3f}" for v in means), f"{less:.1%}"])
    head = (
        "devices",
        "EPLB: rows",
        "EPLB: balancedness",
        "mesh: rows",
        "mesh: balancedness",
        "mesh with co-activation: rows",
        "mesh with co-activation: balancedness",
        "fewer rows than EPLB",
    )
    text = (
        "A token is sent once to each device that holds one of its experts. If the planner knows "
        "which experts are activated together, it places them on one device, and a token has fewer "
        "rows. The loads are those of github, arxiv and wikipedia text."
    )
    return _titled("Rows sent for a token", head, lines, text)


def _rows_of(counts: Ints, devices: int, tokens: int) -> list[float]:
    """Rows of a token and balancedness with EPLB, mesh, and mesh with co-activation."""
    topology = PlannedTopology.uniform(devices, 1)
    profile = data.profile(counts.sum(1).astype(np.float64))
    pairs = {("mlp", i): data.coactivation(layer) for i, layer in enumerate(counts)}
    drawn = [data.routes(layer, tokens) for layer in counts]
    found = []
    for plan in (
        eplb.plan(profile, topology),
        mesh.plan(profile, topology),
        mesh.plan(profile, topology, coactivation=pairs),
    ):
        each = zip(plan.placement.banks, drawn, strict=True)
        found.append(statistics.mean(measures.rows_a_token(bank, route) for bank, route in each))
        found.append(statistics.mean(plan.balancedness))
    return found


def simulation(size: Size) -> str:
    """Policies for a load that drifts from one distribution to another in windows."""
    first, last = data.lognormal(256, 0.9, size.layers_simulated), data.zipf(256, 0.6)
    drifting = measures.drift(first, last[: len(first)], size.windows_simulated, 0.15)
    trace = [data.profile(loads) for loads in (first, *drifting)]
    lines = []
    for g in size.devices_simulated:
        topology = PlannedTopology.uniform(g, 1)
        for policy in POLICIES:
            found = simulate(trace, topology, policy, ExpertStepCost(), 0.05)
            lines.append(
                [
                    f"G={g}, {policy}",
                    f"{statistics.mean(w.balancedness for w in found):.3f}",
                    f"{found[-1].balancedness:.3f}",
                    f"{statistics.mean(w.prefill_step_s for w in found) * 1e3:.2f}",
                    f"{statistics.mean(w.decode_step_s for w in found) * 1e3:.2f}",
                    f"{sum(w.bytes_moved for w in found) / 1e9:.1f}",
                ]
            )
    head = (
        "devices, policy",
        "balancedness, mean of the windows",
        "balancedness, last window",
        "prefill step, ms",
        "decode step, ms",
        "moved weights, GB",
    )
    text = (
        f"256 experts x {len(first)} layers under {size.windows_simulated} windows of load with "
        "15% drift each. Each window runs under the plan for the window before. Policies: `never` "
        "keeps the first plan, `eplb` and `mesh` plan after each window. Times of steps are the "
        "predicted times of the experts."
    )
    return _titled("Simulated policies", head, lines, text)


def speed(size: Size) -> str:
    """CPU time of a plan."""
    if not size.has_speed:
        return "### Planning time\n\nNot measured."
    full, incremental = measures.speed()
    lines = [["128 x 61 x 64", f"{full * 1e3:.0f}", f"{incremental * 1e3:.0f}"]]
    head = (
        "experts x layers x devices",
        "plan without an earlier placement, ms",
        "plan after 10% noise that moves at most 2% of the slots, ms",
    )
    return _titled("Planning time, CPU time of one thread", head, lines)


def _titled(title: str, head: Sequence[str], lines: Sequence[Sequence[str]], text: str = "") -> str:
    return "\n\n".join(part for part in (f"### {title}", text, table(head, lines)) if part)
