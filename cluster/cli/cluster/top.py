"""``top``: shows periodically how busy each worker is."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from heapq import nlargest
from typing import Any

from cluster.cli.terminal.arguments import CommandParsers, add_served_model_option, seconds
from cluster.cli.terminal.client import Client
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.cli.terminal.exposition import read_series
from cluster.cli.terminal.output import table, write_json, write_line, write_result
from cluster.core.topology import LARGE_CLUSTER

DEFAULT_INTERVAL_S = 1.0
_NAMES = (
    "num_requests_running|num_requests_waiting|kv_cache_usage_perc|iteration_tokens_total_sum|"
    "expert_worker_tokens_total|expert_worker_busy_seconds_total"
)
_ROWS = {
    "attention": "iteration_tokens_total_sum",
    "colocated": "iteration_tokens_total_sum",
    "expert": "expert_worker_tokens_total",
}
"""Name of the counter that measures a worker's work, by role: tokens of steps, or expert rows."""
_CLEAR = "\x1b[H\x1b[J"

Numbers = Mapping[tuple[str, str], float]
"""Metric values by (metric, worker), summed over other labels; an empty worker is the cluster."""


def add_commands(commands: CommandParsers) -> None:
    parser = commands.add("top", run, "show repeatedly how busy each worker is")
    text = "Time between two tables, over which rates are averaged"
    parser.add_argument(
        "--interval", type=seconds, default=DEFAULT_INTERVAL_S, metavar="SECONDS", help=text
    )
    text = "Print one table and exit; implied if stdout is no terminal"
    parser.add_argument("--once", action="store_true", help=text)
    add_served_model_option(parser)


def run(args: argparse.Namespace) -> int:
    """Print a table and redraw it until interrupted."""
    client = Client(args)
    is_once = args.once or args.json or not sys.stdout.isatty()
    status = client.get("/cluster/v1/status")  # selects the key that shows most
    model = str((status.get("model") or {}).get("name", ""))
    before, then = parse_series(client.get_text("/metrics"), model), time.monotonic()
    while True:
        time.sleep(args.interval)
        status = client.get("/cluster/v1/status")
        now, at = parse_series(client.get_text("/metrics"), model), time.monotonic()
        document = make_document(status, before, now, at - then)
        if args.json:
            write_json(document)
        else:
            write_result("" if is_once else _CLEAR)
            write_line(_text(document))
        if is_once:
            return ExitCode.OK
        before, then = now, at


def parse_series(text: str, model: str = "") -> dict[tuple[str, str], float]:
    """Parse a Prometheus exposition and sum the series of ``_NAMES`` by name and worker.

    ``model``: name of a model, to sum only its series; empty: all models.
    """
    found: dict[tuple[str, str], float] = {}
    for name, labels, value in read_series(text, _NAMES):
        if model and labels.get("model_name") != model:
            continue
        key = (name, labels.get("worker", ""))
        found[key] = found.get(key, 0.0) + value
    return found


def make_document(
    status: Mapping[str, Any], before: Numbers, now: Numbers, seconds: float
) -> dict[str, Any]:
    """Make the document of ``top`` from two scrapes of the metrics that are ``seconds`` apart."""

    def rate(name: str, worker: str = "") -> float | None:
        at = (name, worker)
        if at not in now:
            return None
        return max(0.0, now[at] - before.get(at, 0.0)) / seconds

    workers = [
        {
            "name": w["name"],
            "state": w["state"],
            "node": w.get("node", ""),
            "running": now.get(("num_requests_running", w["name"])),
            "waiting": now.get(("num_requests_waiting", w["name"])),
            "kv_usage": now.get(("kv_cache_usage_perc", w["name"])),
            "rows_per_s": rate(_ROWS[w["role"]], w["name"]),
            "busy": rate("expert_worker_busy_seconds_total", w["name"]),
        }
        for w in status["workers"]
    ]
    # Attention computes rows of prompts and of outputs.
    computed = [w["rows_per_s"] or 0.0 for w in workers if w["kv_usage"] is not None]
    return {
        "schema": 1,
        "state": status["state"],
        "tokens_per_s": sum(computed),
        "workers": workers,
    }


def _text(document: Mapping[str, Any]) -> str:
    header = ("NAME", "STATE", "NODE", "RUNNING", "WAITING", "KV", "ROWS/S", "BUSY")
    workers: Sequence[dict[str, Any]] = document["workers"]
    shown = _busiest(workers)
    rows = [
        (
            *(w["name"], w["state"], w["node"]),
            *(_rate_text(w[key]) for key in ("running", "waiting")),
            _percent(w["kv_usage"]),
            _rate_text(w["rows_per_s"]),
            _percent(w["busy"]),
        )
        for w in shown
    ]
    tokens = f"{document['state']}: {document['tokens_per_s']:.0f} tokens/s of prompts and answers"
    if len(shown) < len(workers):
        tokens += f"\nthe {len(shown)} busiest of {len(workers)} workers; --json shows all"
    return f"{tokens}\n\n{table(header, rows)}"


def _busiest(workers: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Return all workers or, in a large cluster, the busiest of each pool."""
    if len(workers) <= LARGE_CLUSTER:
        return workers
    attention = [w for w in workers if w["kv_usage"] is not None]
    others = [w for w in workers if w["kv_usage"] is None]
    num_each = LARGE_CLUSTER // 2
    return [
        *nlargest(num_each, attention, key=lambda w: (w["waiting"] or 0, w["rows_per_s"] or 0)),
        *nlargest(num_each, others, key=lambda w: (w["busy"] or 0, w["rows_per_s"] or 0)),
    ]


def _rate_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"
