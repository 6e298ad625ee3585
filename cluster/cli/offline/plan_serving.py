"""``plan simulate`` of requests: predicts tokens/s, TTFT and ITL of a cluster before it exists."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from statistics import mean
from typing import Any, get_args

from cluster.cli.offline.plan_size import add_hardware, device_text, model_size, read_hardware
from cluster.cli.options.workload_options import (
    add_arrival_options,
    make_arrivals,
    max_concurrency,
)
from cluster.cli.terminal.arguments import count, count_or_0, positive
from cluster.cli.terminal.output import show, table
from cluster.cli.terminal.progress import Progress
from cluster.config.cluster import EngineSection
from cluster.config.workers import ShareExperts, WorkersSection
from cluster.core.checks import check
from cluster.launch.checkpoint_check import CheckpointFacts
from cluster.simulation.serving import ServingSimulation, StepShares
from cluster.sizing.group_steps import GroupSizes, GroupSteps, choose_sharing
from cluster.sizing.mixed_step import PoolSizes, StepTimes
from cluster.workload.arrivals import Arrival
from cluster.workload.tally import MEASURES, Tally
from workers.engine.micro_batches import MicroBatchRule

_TRACE = (
    "File of requests: JSON lines in Mooncake's format, .csv in Azure's. With --devices: file of "
    "load profiles, one per line; each line is the load of one window"
)
_STEPS_SHOWN = 200
"""Steps between two lines of progress."""
_PARTS = ("attention", "experts", "exchange", "host")
"""Parts of a step with a share of the time."""


def add_serving(parser: argparse.ArgumentParser) -> None:
    """Add the options of a cluster and its requests."""
    text = "Folder or hub id; only config.json is read"
    parser.add_argument("model", nargs="?", metavar="MODEL", help=text)
    add_arrival_options(parser, _TRACE)
    pools = parser.add_argument_group("cluster, as in serve")
    text = "Number of attention workers, or of colocated workers"
    pools.add_argument("--num-attention-workers", type=count, help=f"{text} (1)")
    text = "Number of attention workers of a step group that computes prompts"
    pools.add_argument("--num-prefill-workers", type=count, help=text)
    text = "Number of attention workers of a step group that decodes"
    pools.add_argument("--num-decode-workers", type=count, help=text)
    text = "Whether step groups share all expert workers"
    choices = get_args(ShareExperts)
    pools.add_argument("--share-experts", choices=choices, default="yes", help=text)
    text = "Number of expert workers; 0: colocated workers hold the experts"
    pools.add_argument("--num-expert-workers", type=count_or_0, default=2, help=text)
    text = "Maximum number of running sequences of an attention worker"
    default = EngineSection().max_num_seqs
    pools.add_argument("--max-num-seqs", type=count, default=default, help=text)
    text = "Maximum number of rows of an attention worker in a step (default: as serve)"
    pools.add_argument("--max-num-batched-tokens", type=count, help=text)
    text = "Target in ms for a step while a request decodes (default: none)"
    pools.add_argument("--itl-target-ms", type=positive, help=text)
    text = "Bytes of KV cache of an attention worker (default: enough for --max-num-seqs requests)"
    pools.add_argument("--kv-cache-bytes", type=count, help=text)
    add_hardware(parser)


def run_serving(args: argparse.Namespace) -> int:
    """Simulate the requests and print what ``bench serve`` would measure."""
    arrivals, most = make_arrivals(args), max_concurrency(args)
    source, facts, device = read_hardware(args)
    on_gpus = bool(device.kernel_s)
    engine = EngineSection(
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        itl_target_ms=args.itl_target_ms,
    )
    pools, workers, groups = _pools(args, facts), _groups(args), None
    num_attention = pools.num_attention if workers is None else workers.num_attention_ranks
    engine = engine.on_gpus(num_attention) if on_gpus else engine
    has_own_core = on_gpus or args.cores >= 1
    size, layout, reason = model_size(args, facts), pools.text, ""
    if workers is not None:
        workers = choose_sharing(
            workers,
            size,
            num_seqs=engine.max_num_seqs,
            step_tokens=engine.step_tokens,
            context_tokens=mean(arrival.input_len for arrival in arrivals),
            device=device,
        )
        sizes, reason = GroupSizes.of(workers), workers.mode_reason
        layout = sizes.text
        groups = GroupSteps(size, sizes, device, balancedness=args.balancedness, seed=args.seed)
    simulation = ServingSimulation(
        StepTimes(size, pools, device, balancedness=args.balancedness, seed=args.seed),
        engine,
        num_attention=pools.num_attention,
        num_kv_blocks=_num_kv_blocks(args, facts, engine, arrivals),
        max_model_len=facts.context_tokens,
        micro_batches=MicroBatchRule(
            setting="auto" if has_own_core and not pools.is_colocated else 1,
            decode_threshold=engine.micro_batch_decode_threshold,
            prefill_threshold=engine.micro_batch_prefill_threshold,
        ),
        max_concurrency=most,
        groups=groups,
        seed=args.seed,
    )
    tally = Tally(dict(args.goodput))
    with Progress() as progress:

        def tick() -> None:
            if simulation.shares.num_steps % _STEPS_SHOWN == 0:
                progress.update(f"{tally.ended} of {len(arrivals)} requests")

        simulation.run(arrivals, tally, tick)
    results = tally.results(simulation.now_s)
    num_groups = 1 if groups is None else 2  # their steps run at the same time
    results["steps"] = _steps(simulation.shares, num_groups * simulation.now_s)
    document = {
        "schema": 1,
        "model": source.name,
        "layout": layout,
        "layout_reason": reason,
        "device": asdict(device),
        "results": results,
    }
    heading = f"{source.name} on {layout} of one {device.name} each: {device_text(device)}"
    heading = f"{heading}\n{reason}" if reason else heading
    return show(args, document, lambda: _text(results), heading)


def _groups(args: argparse.Namespace) -> WorkersSection | None:
    """Return the workers of a cluster with step groups; None without groups."""
    given = (args.num_prefill_workers, args.num_decode_workers)
    if given == (None, None) and args.share_experts == "yes":
        return None
    return WorkersSection(
        mode="disaggregated" if args.num_expert_workers else "colocated",
        num_attention_workers=args.num_attention_workers,
        num_prefill_workers=args.num_prefill_workers,
        num_decode_workers=args.num_decode_workers,
        num_expert_workers=args.num_expert_workers,
        share_experts=args.share_experts,
    )


def _pools(args: argparse.Namespace, facts: CheckpointFacts) -> PoolSizes:
    is_colocated = args.num_expert_workers == 0
    num_attention = args.num_attention_workers or 1
    number = num_attention if is_colocated else args.num_expert_workers
    experts = min((bank["num_experts"] for bank in facts.banks), default=0)
    check(experts > 0, "model", "no expert bank", "must have experts")
    name = "num_attention_workers" if is_colocated else "num_expert_workers"
    check(number <= experts, name, number, f"must not exceed the {experts} experts of a bank")
    return PoolSizes(num_attention=num_attention, num_experts=number, is_colocated=is_colocated)


def _num_kv_blocks(
    args: argparse.Namespace,
    facts: CheckpointFacts,
    engine: EngineSection,
    arrivals: list[Arrival],
) -> int:
    """Return the KV blocks of an attention worker."""
    size = engine.block_size_tokens
    if args.kv_cache_bytes is not None:
        blocks: int = args.kv_cache_bytes // (facts.kv_bytes_per_token("auto") * size)
        check(blocks > 0, "kv_cache_bytes", args.kv_cache_bytes, f"must hold {size} tokens")
        return blocks
    longest = max(arrival.input_len + arrival.output_len for arrival in arrivals)
    return engine.max_num_seqs * -(-min(longest, facts.context_tokens) // size)


def _steps(shares: StepShares, duration_s: float) -> dict[str, float]:
    """Return numbers of the steps: which part of the cluster the requests wait for."""
    number = max(shares.num_steps, 1)
    parts = {name: getattr(shares, f"{name}_s") for name in _PARTS}
    return {
        "count": shares.num_steps,
        "mean_ms": 1e3 * shares.busy_s / number,
        "mean_rows": shares.num_rows / number,
        **{f"{name}_share": seconds / max(duration_s, 1e-9) for name, seconds in parts.items()},
    }


def _text(results: Mapping[str, Any]) -> str:
    columns = ("mean", "median", "p90", "p99")
    names = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "E2E latency"}
    rows = [
        (f"{names[name]} ms", *(_number(results[f"{name}_ms"][column]) for column in columns))
        for name in MEASURES
    ]
    steps = results["steps"]
    rates = ", ".join(
        f"{results[f'{key}_per_s']:.{digits}f} {key.replace('_', ' ')}/s"
        for key, digits in (("requests", 2), ("output_tokens", 0), ("tokens", 0))
    )
    busy = ", ".join(f"{part} {steps[f'{part}_share']:.0%}" for part in _PARTS)
    lines = [
        f"{results['successful']} requests in {results['duration_s']:.1f} s, {results['failed']} "
        f"failed: {rates}",
        "",
        table(("", *map(str.upper, columns)), rows),
        "",
        f"{steps['count']} steps of {steps['mean_ms']:.2f} ms with {steps['mean_rows']:.0f} rows. "
        f"Busy part of the time: {busy}.",
        "Left out: common prefixes, drafts, gateways, faults and rebalancing.",
    ]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
