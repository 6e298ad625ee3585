"""``plan simulate``: what re-planning would have brought under a load that changes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from cluster.cli.exit_codes import ExitCode
from cluster.cli.terminal import note, out_json, out_line, table
from cluster.planner.base import PlannedTopology
from cluster.simulate import POLICIES, Policy, SimulatedWindow, StepCost, load_trace, simulate

_COST = StepCost()


def add_simulate(kinds: Any, common: argparse.ArgumentParser) -> None:
    """Register ``plan simulate``."""
    parser = kinds.add_parser(
        "simulate", parents=[common], help="replay a changing load under policies of re-planning"
    )
    parser.add_argument(
        "--trace", type=Path, required=True, metavar="F", help="load profiles, one a line"
    )
    parser.add_argument("--devices", type=int, required=True, metavar="N", help="expert workers")
    parser.add_argument("--nodes", type=int, default=1, metavar="M", help="hosts they are on")
    parser.add_argument(
        "--redundant", type=int, default=1, metavar="R", help="spare slots per device and layer (1)"
    )
    parser.add_argument("--policy", choices=POLICIES, help="one policy only; default: all")
    parser.add_argument(
        "--max-move-fraction",
        type=float,
        default=0.05,
        metavar="X",
        help="share of the slots that mesh may change a window (0.05)",
    )
    cost = parser.add_argument_group("what a device takes; defaults: dots.llm1 on an H100")
    cost.add_argument(
        "--slot-us", type=float, default=_COST.slot_s * 1e6, metavar="US", help="an activated slot"
    )
    cost.add_argument(
        "--token-us", type=float, default=_COST.token_s * 1e6, metavar="US", help="a token's expert"
    )
    cost.add_argument("--expert-bytes", type=int, default=_COST.expert_bytes, metavar="BYTES")
    cost.add_argument("--prefill-tokens", type=int, default=_COST.prefill_tokens, metavar="T")
    cost.add_argument("--decode-tokens", type=int, default=_COST.decode_tokens, metavar="B")
    parser.set_defaults(run=run_simulate)


def run_simulate(args: argparse.Namespace) -> int:
    """Print each policy's windows."""
    step = StepCost(
        slot_s=args.slot_us * 1e-6,
        token_s=args.token_us * 1e-6,
        expert_bytes=args.expert_bytes,
        prefill_tokens=args.prefill_tokens,
        decode_tokens=args.decode_tokens,
    )
    trace = load_trace(args.trace)
    topology = PlannedTopology.uniform(args.devices, args.redundant, args.nodes)
    policies: Sequence[Policy] = (args.policy,) if args.policy else POLICIES
    found = {p: simulate(trace, topology, p, step, args.max_move_fraction) for p in policies}
    if args.json:
        windows = {name: [w.to_dict() for w in each] for name, each in found.items()}
        out_json({"schema": 1, "devices": args.devices, "policies": windows})
        return ExitCode.OK
    note(f"{len(trace) - 1} windows on {args.devices} devices; each runs what the last one taught")
    out_line(_text(found))
    return ExitCode.OK


def _text(found: Mapping[Policy, Sequence[SimulatedWindow]]) -> str:
    """Every window under every policy, then the means."""
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
        "BALANCEDNESS: mean over maximum device load, 1 is ideal; the mean over layers. "
        "PREFILL, DECODE: the experts'\npart of a step, over all layers. MOVED: before the window."
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
