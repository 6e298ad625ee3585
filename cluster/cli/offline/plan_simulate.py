"""``plan simulate``: simulates a cluster that serves requests, or the gain of rebalancing."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import mean

from cluster.cli.offline.plan_serving import add_serving, run_serving
from cluster.cli.terminal.arguments import (
    CommandParsers,
    count,
    count_or_0,
    fraction_or_0,
    not_negative,
)
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import show, table
from cluster.cli.terminal.progress import Progress
from cluster.planner.base import PlannedTopology
from cluster.sizing.replay import (
    POLICIES,
    ExpertStepCost,
    Policy,
    SimulatedWindow,
    load_trace,
    simulate,
)

_COST = ExpertStepCost()


def add_simulate(kinds: CommandParsers) -> None:
    parser = kinds.add(
        "simulate",
        run_simulate,
        "simulate a cluster that serves requests, or rebalancing under a changing load",
    )
    add_serving(parser)
    text = "Number of hosts, among which the workers are divided; the network matters above 1"
    parser.add_argument("--nodes", type=count, default=1, help=text)
    policies = parser.add_argument_group("rebalancing")
    text = "Number of expert workers; simulates rebalancing policies and no requests"
    policies.add_argument("--devices", type=count, help=text)
    text = "Number of spare expert slots per device and layer"
    policies.add_argument("--redundant", type=count_or_0, default=1, help=text)
    text = "Simulate only this policy (default: all)"
    policies.add_argument("--policy", choices=POLICIES, help=text)
    text = "Largest share of the expert slots that mesh may change in a window"
    policies.add_argument("--max-move-fraction", type=fraction_or_0, default=0.05, help=text)
    text = "rebalancing: times and sizes of a device; defaults: dots.llm1 on an H100"
    cost = parser.add_argument_group(text)
    text = "Time in microseconds for an activated expert slot"
    cost.add_argument("--slot-us", type=not_negative, default=_COST.slot_s * 1e6, help=text)
    text = "Time in microseconds for a row in an expert"
    cost.add_argument("--token-us", type=not_negative, default=_COST.token_s * 1e6, help=text)
    text = "Bytes of the weights of an expert"
    cost.add_argument("--expert-bytes", type=count, default=_COST.expert_bytes, help=text)
    for phase in ("prefill", "decode"):
        rows = getattr(_COST, f"{phase}_tokens")
        text = f"Rows of a {phase} step"
        cost.add_argument(f"--{phase}-tokens", type=count, default=rows, help=text)


def add_devices(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe the devices to plan for."""
    parser.add_argument("--devices", type=count, required=True, help="Number of expert workers")
    text = "Number of hosts, among which the devices are divided"
    parser.add_argument("--nodes", type=count, default=1, help=text)
    text = "Number of spare expert slots per device and layer"
    parser.add_argument("--redundant", type=count_or_0, default=0, help=text)


def run_simulate(args: argparse.Namespace) -> int:
    """Simulate requests, or rebalancing if ``--devices`` is given."""
    return run_serving(args) if args.devices is None else run_policies(args)


def run_policies(args: argparse.Namespace) -> int:
    """Print the simulated times of each rebalancing policy in each window of the trace."""
    if args.trace is None:
        raise CommandError(ExitCode.USAGE, "--devices needs --trace, a file of load profiles")
    step = ExpertStepCost(
        slot_s=args.slot_us * 1e-6,
        token_s=args.token_us * 1e-6,
        expert_bytes=args.expert_bytes,
        prefill_tokens=args.prefill_tokens,
        decode_tokens=args.decode_tokens,
    )
    trace = load_trace(args.trace)
    topology = PlannedTopology.uniform(args.devices, args.redundant, args.nodes)
    policies: Sequence[Policy] = (args.policy,) if args.policy else POLICIES
    found = {}
    with Progress(lines=False) as progress:
        for place, policy in enumerate(policies, 1):
            progress.update(f"policy {policy}, {place} of {len(policies)}")
            found[policy] = simulate(trace, topology, policy, step, args.max_move_fraction)
    windows = {name: [asdict(w) for w in each] for name, each in found.items()}
    document = {"schema": 1, "devices": args.devices, "policies": windows}
    heading = f"{len(trace) - 1} windows on {args.devices} devices; each uses the plan of the last"
    return show(args, document, lambda: _text(found), heading)


def _text(found: Mapping[Policy, Sequence[SimulatedWindow]]) -> str:
    """Format every window under every policy, followed by the means of each policy."""
    head = (
        "WINDOW",
        "POLICY",
        "BALANCEDNESS",
        "PREFILL MS",
        "DECODE MS",
        "SLOTS MOVED",
        "GB MOVED",
    )
    rows = [
        (str(number) if i == 0 else "", policy, *_numbers(window))
        for number, windows in enumerate(zip(*found.values(), strict=True), start=1)
        for i, (policy, window) in enumerate(zip(found, windows, strict=True))
    ]
    totals = [
        (
            policy,
            f"{mean(w.balancedness for w in each):.3f}",
            f"{mean(w.prefill_step_s for w in each) * 1e3:.2f}",
            f"{mean(w.decode_step_s for w in each) * 1e3:.2f}",
            f"{sum(w.bytes_moved for w in each) / 1e9:.1f}",
        )
        for policy, each in found.items()
    ]
    heads = ("POLICY", "BALANCEDNESS", "PREFILL STEP MS", "DECODE STEP MS", "GB MOVED IN ALL")
    legend = (
        "BALANCEDNESS: mean over maximum device load (1 is ideal), averaged over the layers. "
        "PREFILL, DECODE: time\nof all experts in a step. MOVED: before the window."
    )
    return f"{table(head, rows)}\n\n{table(heads, totals)}\n\n{legend}"


def _numbers(window: SimulatedWindow) -> tuple[str, ...]:
    return (
        f"{window.balancedness:.3f}",
        f"{window.prefill_step_s * 1e3:.2f}",
        f"{window.decode_step_s * 1e3:.2f}",
        str(window.slots_moved),
        f"{window.bytes_moved / 1e9:.1f}",
    )
