"""``plan size``: computes the best sizes of the pools, and whether one shared pool is faster."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from cluster.cli.terminal.arguments import CommandParsers, count, fraction, not_negative, positive
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import note, show, table
from cluster.config.resources import WorkerShare
from cluster.core.errors import CheckpointError
from cluster.core.load_profile import load_profile
from cluster.launch.checkpoint_check import CheckpointCheck, CheckpointFacts
from cluster.launch.model_source import ModelSource, find_model
from cluster.sizing.devices import worker_device
from cluster.sizing.gpus import gpu_spec
from cluster.sizing.pool_sizes import PoolChoice, size_pools
from cluster.sizing.roofline import DeviceSpec, ModelSize, StepTime

BATCHES = (1, 8, 32, 128, 512)
FORMULA = """\
activated        u(B) = sum over experts of 1 - (1 - p)^B
experts          max(u(B) x bytes / bandwidth, 2 x B x k x params / flops) / workers / balancedness
attention        (weights + B x context x KV bytes) / bandwidth
kernels          on GPUs, in experts and attention: layers x kernels x time to start a kernel
exchange         rows x distinct workers a row x bytes / link + latencies, there and back
host             time of a step + rows of an attention worker x time of a row
two pools        with m micro-batches: host + max(m x attention, m x experts, one micro-batch's
                 total time)
one pool         host + m x (attention + experts), or host + one with its exchange, whichever is
                 longer"""


def add_size(kinds: CommandParsers) -> None:
    parser = kinds.add(
        "size", run_size, "estimate the best sizes of the pools with a roofline model"
    )
    text = "Folder or hub id; only config.json is read"
    parser.add_argument("model", nargs="?", metavar="MODEL", help=text)
    parser.add_argument("--workers", type=count, required=True, help="Total number of workers")
    text = "Rows of decode steps to estimate"
    parser.add_argument(
        "--batch", type=parse_whole_numbers, default=BATCHES, metavar="N,...", help=text
    )
    text = "Mean tokens of context of a sequence"
    parser.add_argument("--context-tokens", type=not_negative, default=1024.0, help=text)
    add_hardware(parser)
    text = "Number of hosts; the network matters above 1"
    parser.add_argument("--nodes", type=count, default=1, help=text)


def add_hardware(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe the load of the experts and a worker, for ``read_hardware``."""
    text = "Load profile of the experts (default: equal load)"
    parser.add_argument("--profile", type=Path, help=text)
    text = "Mean expert load of all workers divided by that of the busiest"
    parser.add_argument("--balancedness", type=fraction, default=1.0, help=text)
    hardware = parser.add_argument_group("hardware of a worker")
    text = "Type of device; by default cuda with --gpu or if this host has a GPU, else cpu"
    hardware.add_argument("--device", choices=("cpu", "cuda"), help=text)
    hardware.add_argument(
        "--gpu",
        metavar="NAME",
        help="GPU of a CUDA worker: A100, H100, H200, B200, L40S, L4; by default this host's, or "
        "H100",
    )
    text = "Number of cores of a CPU worker"
    hardware.add_argument("--cores", type=positive, default=1.0, help=text)
    text = "Memory bandwidth in GB/s (default: the device's)"
    hardware.add_argument("--bandwidth-gb-s", type=positive, help=text)
    text = "Rate of dense products in TFLOPS (default: the device's)"
    hardware.add_argument("--tflops", type=positive, help=text)
    text = "Bandwidth between workers in GB/s, one way (default: the device's)"
    hardware.add_argument("--link-gb-s", type=positive, help=text)
    text = "Latency of a message in microseconds (default: the device's)"
    hardware.add_argument("--latency-us", type=positive, help=text)


def parse_whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(count(part) for part in text.split(","))
    except argparse.ArgumentTypeError as err:
        raise argparse.ArgumentTypeError("must be whole numbers above 0, with commas") from err


def run_size(args: argparse.Namespace) -> int:
    """Print the best pool sizes for each batch size."""
    source, facts, device = read_hardware(args)
    found = size_pools(
        model_size(args, facts),
        args.batch,
        args.context_tokens,
        num_workers=args.workers,
        device=device,
        balancedness=args.balancedness,
    )
    document = {
        "schema": 1,
        "model": source.name,
        "device": asdict(device),
        "batches": [_document(choice) for choice in found],
    }
    heading = (
        f"{source.name} on {args.workers} workers of one {device.name} each: {device_text(device)}"
    )
    return show(args, document, lambda: _text(found), heading)


def read_hardware(args: argparse.Namespace) -> tuple[ModelSource, CheckpointFacts, DeviceSpec]:
    """Return the model, its facts, and the characteristics of a worker.

    Raises ``CommandError`` if the model cannot be read.
    """
    changes = given_device_fields(args)
    try:
        source = find_model(args.model, note)
        facts = CheckpointCheck(source.folder, os.environ, allow_bare=True).result()
    except CheckpointError as err:
        raise CommandError(ExitCode.FAILED, str(err)) from err
    gpu = gpu_spec(args.gpu) if args.gpu else gpu_spec(facts.gpu, facts.gpu_bandwidth_bytes_s)
    has_gpu = bool(args.gpu or facts.gpu)
    kind: Literal["cpu", "cuda"] = args.device or ("cuda" if has_gpu else "cpu")
    share = WorkerShare(cpus=args.cores, gpus=1.0 if kind == "cuda" else 0.0, device=kind)
    return source, facts, replace(worker_device(share, args.nodes, gpu), **changes)


def model_size(args: argparse.Namespace, facts: CheckpointFacts) -> ModelSize:
    """Return the sizes of the model, with the load of its experts if ``--profile`` is given."""
    return facts.size("auto", load_profile(args.profile) if args.profile is not None else None)


def given_device_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of ``DeviceSpec`` that options replace, by name."""
    given = {
        "bandwidth_bytes_s": (args.bandwidth_gb_s, 1e9),
        "flops_s": (args.tflops, 1e12),
        "link_bytes_s": (args.link_gb_s, 1e9),
        "latency_s": (args.latency_us, 1e-6),
    }
    return {name: value * unit for name, (value, unit) in given.items() if value is not None}


def _document(choice: PoolChoice) -> dict[str, Any]:
    steps = {"disaggregated": choice.disaggregated, "colocated": choice.colocated}
    return {
        "batch": choice.batch,
        "num_attention_workers": choice.num_attention,
        "num_expert_workers": choice.num_experts,
        "touched_experts": choice.activated,
        "mode": "colocated" if choice.colocated_wins else "disaggregated",
        "tokens_per_s": choice.tokens_per_s,
        **{name: asdict(step) if step is not None else None for name, step in steps.items()},
    }


def _text(found: Sequence[PoolChoice]) -> str:
    header = (
        "BATCH",
        "EXPERTS ACTIVATED",
        "ATTENTION : EXPERT",
        "TWO POOLS: STEP MS",
        "ONE POOL: STEP MS",
        "FASTER",
        "TOKENS/S",
    )
    rows = [
        (
            c.batch,
            f"{c.activated:.1f}",
            f"{c.num_attention} : {c.num_experts}" if c.disaggregated else "-",
            _step(c.disaggregated),
            _step(c.colocated),
            "one pool (colocated)" if c.colocated_wins else "two pools",
            f"{c.tokens_per_s:.0f}",
        )
        for c in found
    ]
    lines = [table(header, rows), "", "In brackets: attention + experts + exchange; host, in ms."]
    if any(c.colocated_wins for c in found):
        lines.append(
            "Where one pool is faster, two pools still give elasticity and failure isolation."
        )
    return "\n".join([*lines, "", FORMULA])


def _step(step: StepTime | None) -> str:
    if step is None:
        return "-"
    parts = " + ".join(
        f"{1e3 * s:.3g}" for s in (step.attention_s, step.experts_s, step.exchange_s)
    )
    times = f"{step.num_micro_batches} x " * (step.num_micro_batches > 1)
    return f"{1e3 * step.step_s:.3g} ({times}{parts}; {1e3 * step.host_s:.3g})"


def device_text(device: DeviceSpec) -> str:
    return (
        f"{device.bandwidth_bytes_s / 1e9:.0f} GB/s memory, {device.flops_s / 1e12:.3g} TFLOPS, "
        f"kernels read at {device.read_share:.0%} of the memory's rate, "
        f"{device.link_bytes_s / 1e9:.3g} GB/s link, {device.latency_s * 1e6:.0f} us latency, "
        f"host {device.host.step_s * 1e3:.2g} ms a step and {device.host.row_s * 1e6:.2g} us a row"
    )
