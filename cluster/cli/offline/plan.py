"""``plan``: computes placements and pool sizes from saved load profiles, without a cluster."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from cluster.cli.offline import plan_page
from cluster.cli.offline.plan_simulate import add_devices, add_simulate
from cluster.cli.offline.plan_size import add_size
from cluster.cli.terminal.arguments import CommandParsers, count, fraction_or_0, positive
from cluster.cli.terminal.output import save, show, table
from cluster.core.checks import check
from cluster.core.load_profile import LoadProfile, load_profile
from cluster.core.placement import ExpertPlacement
from cluster.core.placement_file import load_placement
from cluster.planner import eplb, mesh
from cluster.planner.assess import assess, contiguous_plan
from cluster.planner.base import Plan, PlannedTopology, PlanOptions

ALGORITHMS = ("mesh", "eplb", "contiguous")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanQuery:
    """Input of the command ``plan placement``."""

    profile: LoadProfile
    """Expert load to plan for."""
    topology: PlannedTopology
    """Devices to plan for."""
    current: ExpertPlacement | None
    """Current placement of the experts; None if it is unknown."""
    options: PlanOptions


def add_commands(commands: CommandParsers) -> None:
    kinds = commands.add_group("plan", "compute placements and pool sizes without a cluster")
    add_placement(kinds)
    add_size(kinds)
    add_simulate(kinds)


def add_placement(kinds: CommandParsers) -> None:
    parser = kinds.add("placement", run_placement, "compute which device should hold which expert")
    add_devices(parser)
    text = "Load profile to plan for; the loads of several profiles are added"
    parser.add_argument("--profile", type=Path, required=True, action="append", help=text)
    text = "Relative speed of each device, separated by commas (default: equal)"
    parser.add_argument("--speeds", type=parse_numbers, metavar="NUMBER,...", help=text)
    parser.add_argument("--current", type=Path, help="File of the placement to start from")
    text = "Largest share of the expert slots that may change (default: any)"
    parser.add_argument("--max-move-fraction", type=fraction_or_0, help=text)
    parser.add_argument("--decode-tokens", type=count, default=16, help="Rows in a decode step")
    text = "Planning algorithm"
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="mesh", help=text)
    parser.add_argument("--compare", action="store_true", help="Show all algorithms side by side")
    text = "HTML file in which to draw the placements before and after"
    parser.add_argument("--plot", type=Path, help=text)


def parse_numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(positive(part) for part in text.split(","))
    except argparse.ArgumentTypeError as err:
        raise argparse.ArgumentTypeError("must be numbers above 0, separated by commas") from err


def run_placement(args: argparse.Namespace) -> int:
    """Print the planned placement; with ``--json`` the output is a placement file."""
    query = read_query(args)
    plan = compute_plan(args.algorithm, query)
    compared = compare(query, {args.algorithm: plan}) if args.compare else {}
    if args.plot is not None:
        write_page(args.plot, query, plan, args.algorithm)
    document = plan.to_dict()
    if compared:
        document["compare"] = {name: summary(p) for name, p in compared.items()}
    rows = compared or {args.algorithm: plan}
    if not compared and query.current is not None:
        rows = {"current": current_plan(query), **rows}
    return show(args, document, lambda: _text(rows), _headline(query))


def read_query(args: argparse.Namespace) -> PlanQuery:
    """Make the query from the options. Raises ``ConfigError`` for inconsistent options."""
    needs = "needs --current: without it every slot is new"
    limited = args.max_move_fraction is not None
    fraction = args.max_move_fraction
    check(not limited or args.current is not None, "--max-move-fraction", fraction, needs)
    only = "ignores the limit on moves: only mesh has one"
    check(not limited or args.algorithm == "mesh", "--algorithm", args.algorithm, only)
    profile = reduce(LoadProfile.merge, map(load_profile, args.profile))
    topology = PlannedTopology.uniform(args.devices, args.redundant, args.nodes, args.speeds)
    current = None
    if args.current is not None:
        current = load_placement(args.current, profile.bank_shapes, args.devices)
    options = PlanOptions(
        max_move_fraction=args.max_move_fraction, decode_tokens=args.decode_tokens
    )
    return PlanQuery(profile=profile, topology=topology, current=current, options=options)


def compute_plan(algorithm: str, query: PlanQuery) -> Plan:
    """Compute the plan of one algorithm for the query."""
    given = (query.profile, query.topology, query.current)
    if algorithm == "mesh":
        return mesh.plan(*given, query.options)
    return eplb.plan(*given) if algorithm == "eplb" else contiguous_plan(*given)


def compare(query: PlanQuery, made: Mapping[str, Plan]) -> dict[str, Plan]:
    """Return the plans of all algorithms, and the current placement as a plan, by name.

    ``made``: plans that have been computed before.
    """
    plans = {"current": current_plan(query)} if query.current is not None else {}
    for name in reversed(ALGORITHMS):
        plans[name] = made[name] if name in made else compute_plan(name, query)
    return plans


def current_plan(query: PlanQuery) -> Plan:
    """Return the current placement as a plan, or the contiguous placement if it is unknown."""
    profile, topology = query.profile, query.topology
    if query.current is None:
        return contiguous_plan(profile, topology)
    return assess(profile, topology, query.current)


def summary(plan: Plan) -> dict[str, Any]:
    """Return predicted stats of a plan, for ``--json``."""
    return {**plan.to_dict()["predicted"], "move_fraction": plan.move_fraction}


def write_page(path: Path, query: PlanQuery, plan: Plan, algorithm: str) -> None:
    """Write the HTML page of ``--plot``. Raises ``CommandError``."""
    name = "contiguous" if query.current is None else "current"
    save(path, plan_page.make_page(query.profile, (name, algorithm), (current_plan(query), plan)))


def _headline(query: PlanQuery) -> str:
    profile, topology = query.profile, query.topology
    return (
        f"{profile.model}: {len(profile.banks)} expert banks on {topology.num_devices} devices, "
        f"{topology.num_redundant} spare slots each; load of {profile.tokens} tokens"
    )


def _text(plans: Mapping[str, Plan]) -> str:
    header = ("PLAN", "BALANCEDNESS", "WORST LAYER", "DECODE 16 / 64 / 256", "SLOTS MOVED")
    rows = []
    for name, plan in plans.items():
        values = plan.balancedness
        peaks = " / ".join(f"{v:.2f}" for v in plan.decode_slots_over_floor.values())
        moved = f"{len(plan.moves)} ({plan.move_fraction:.1%})"
        mean = sum(values) / len(values)
        rows.append((name, f"{mean:.3f}", f"{min(values):.3f}", peaks, moved))
    legend = (
        "BALANCEDNESS: mean over maximum device load (1 is ideal), averaged over the layers.\n"
        "DECODE: activated slots of the worst device over the minimum, for 16, 64, 256 rows a step."
    )
    return f"{table(header, rows)}\n\n{legend}"
