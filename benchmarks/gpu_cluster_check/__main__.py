"""Check a cluster on the GPUs of this host: ``python -m benchmarks.gpu_cluster_check --out DIR``.

Writes random checkpoints in the shapes of public models to DIR/checkpoints, 75 GB in all, and
appends a line of JSON for each model and division of the GPUs to DIR/gpu_cluster_check.jsonl. The
log of each server is in a folder of its own. The exit code is 1 if a cluster does not start or end,
if greedy tokens in float32 differ between divisions, or if a request fails while a worker is
killed.

    python -m benchmarks.gpu_cluster_check --expect    # predictions for 8 H100s, runs nothing
    python -m benchmarks.gpu_cluster_check --tiny      # 3 processes without GPUs, to try it
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import random_checkpoint
from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.gpu_check.predicted import device_spec
from benchmarks.gpu_cluster_check import checks
from benchmarks.gpu_cluster_check.checks import Sizes
from benchmarks.gpu_cluster_check.layouts import PUBLIC, SMALL, Layout, layouts
from benchmarks.harness.server import running_server
from benchmarks.report.results import table
from cluster.cli.terminal.arguments import count
from cluster.cli.terminal.output import note, write_line
from cluster.sizing.gpus import H100
from cluster.sizing.roofline import DeviceSpec

FILE = "gpu_cluster_check.jsonl"
_TINY_WORKERS = 3
_START_LIMIT_S = 900.0
"""Longest start: a worker may have to load 61 GB and to compile all kernels."""
_LEAST_EQUAL = 0.9
"""Least share of equal tokens in float32: one prompt of 16 may reach two equally likely tokens."""
_HEAD = ("model, workers, streams", "tokens/s", "step, ms", "predicted, ms", "predicted / measured")


class Check:
    """Runs the clusters one after the other and keeps a row of results for each."""

    def __init__(self, out: Path, device: str, spec: DeviceSpec, sizes: Sizes) -> None:
        """``device``: ``cuda`` or ``cpu``; ``spec``: characteristics of one device."""
        self.rows: list[dict[str, Any]] = []
        self._out = out
        self._device = device
        self._spec = spec
        self._sizes = sizes
        self._tokens: dict[str, list[list[int]]] = {}
        """Greedy tokens of each model in its first layout."""

    def run(self, name: str, model: RandomModel, checkpoint: Path, layout: Layout) -> None:
        """Start a cluster, run all checks, end it, and append a row to the file."""
        row: dict[str, Any] = {"model": name, "layout": str(layout), "errors": []}
        note(f"{name}: {layout}")
        try:
            self._measure(row, name, model, checkpoint, layout)
        except Exception as err:  # the next cluster may work
            row["errors"].append(f"{type(err).__name__}: {err}")
        self.rows.append(row)
        with (self._out / FILE).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _measure(
        self, row: dict[str, Any], name: str, model: RandomModel, checkpoint: Path, layout: Layout
    ) -> None:
        folder = self._out / f"{name} {layout}".replace(" ", "-")
        folder.mkdir(parents=True)
        dtype = "float32" if name in SMALL else "bfloat16"
        words = [str(checkpoint), *layout.options(self._device), "--dtype", dtype]
        words += ["--max-num-seqs", str(layout.max_num_seqs), "--max-model-len", "1024"]
        began = time.monotonic()
        with running_server(folder, *words, start_limit_s=_START_LIMIT_S) as served:
            row["ready_s"] = time.monotonic() - began
            found = checks.tokens(served, self._sizes)
            first = self._tokens.setdefault(name, found)
            row["equal_tokens"] = equal_share(found, first)
            if dtype == "float32" and row["equal_tokens"] < _LEAST_EQUAL:
                row["errors"].append("greedy tokens in float32 are not those of the first division")
            row["speed"] = {}
            for batch in self._sizes.batches:
                if batch > layout.max_streams:
                    continue
                measured = checks.speed(served, self._sizes, batch, folder)
                step = layout.predicted(model, batch, self._sizes.context, self._spec)
                row["speed"][batch] = {**measured, "predicted_s": step.step_s}
            row["kills"] = {}
            for role in layout.killed_roles:
                killed = checks.kill(served, self._sizes, role, folder)
                row["kills"][role] = killed
                if killed["failed"] or not killed["recoveries"]:
                    row["errors"].append(f"killed {role} worker: {killed}")


def equal_share(found: list[list[int]], first: list[list[int]]) -> float:
    """Return the mean share of a sequence before its first token that differs."""
    shares = []
    for mine, other in zip(found, first, strict=True):
        same = [a == b for a, b in zip(mine, other, strict=True)]
        shares.append((same.index(False) if False in same else len(same)) / len(same))
    return sum(shares) / len(shares)


def speed_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the measured and predicted decode steps of all rows as a Markdown table."""
    cells = []
    for row in rows:
        for batch, one in row.get("speed", {}).items():
            measured, predicted = one.get("step_s"), one["predicted_s"]
            cells.append(
                [
                    f"{row['model']}, {row['layout']}, {batch}",
                    f"{one['tokens_per_s']:.0f}",
                    f"{1e3 * measured:.2f}" if measured else "",
                    f"{1e3 * predicted:.2f}",
                    f"{predicted / measured:.2f}" if measured else "",
                ]
            )
    return table(_HEAD, cells)


def expected(num_devices: int, spec: DeviceSpec, sizes: Sizes) -> list[dict[str, Any]]:
    """Return rows of predictions for the public models, without measured values."""
    rows: list[dict[str, Any]] = []
    for name, model in PUBLIC.items():
        for layout in layouts(num_devices):
            speed = {}
            for batch in sizes.batches:
                if batch > layout.max_streams:
                    continue
                step_s = layout.predicted(model, batch, sizes.context, spec).step_s
                speed[batch] = {"tokens_per_s": batch / step_s, "predicted_s": step_s}
            rows.append({"model": name, "layout": str(layout), "speed": speed})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; returns 1 if a cluster has an error."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_cluster_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = "for results and checkpoints; must not exist (gpu-cluster-check)"
    parser.add_argument("--out", type=Path, default=Path("gpu-cluster-check"), help=text)
    text = "GPUs to use (all), with --expect 8 by default"
    parser.add_argument("--gpus", type=count, metavar="NUMBER", help=text)
    choices = sorted({*PUBLIC, *SMALL})
    parser.add_argument("--models", nargs="+", choices=choices, default=choices)
    parser.add_argument("--expect", action="store_true", help="print the predictions only")
    parser.add_argument("--tiny", action="store_true", help="a small model on CPUs")
    args = parser.parse_args(arguments)
    if args.expect:
        write_line(speed_table(expected(args.gpus or 8, H100, Sizes())))
        return 0
    num_gpus = torch.cuda.device_count()
    if not args.tiny and num_gpus < (args.gpus or 1):
        raise SystemExit(f"--gpus: torch finds {num_gpus} GPUs; --tiny needs none")
    args.out = args.out.absolute()
    args.out.mkdir(parents=True)
    device = "cpu" if args.tiny else "cuda"
    sizes = checks.TINY if args.tiny else Sizes()
    check = Check(args.out, device, device_spec(torch.device(device)), sizes)
    for name, model in ({**SMALL} if args.tiny else {**SMALL, **PUBLIC}).items():
        if name in args.models:
            checkpoint = random_checkpoint.write(model, args.out / "checkpoints" / name)
            for layout in layouts(_TINY_WORKERS if args.tiny else args.gpus or num_gpus):
                check.run(name, model, checkpoint, layout)
    write_line(f"\n{speed_table(check.rows)}")
    errors = [f"{row['model']}, {row['layout']}: {e}" for row in check.rows for e in row["errors"]]
    for error in errors:
        write_line(error)
    note(f"wrote {args.out / FILE}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
