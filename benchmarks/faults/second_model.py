"""Time between tokens of a model while a second one is loaded.

    python -m benchmarks.faults.second_model [--quick] [--loads N] [--streams N]

``expertmesh serve`` runs the bundled model with one attention and two expert workers, and clients
stream from it. A second model with the same weights is loaded and unloaded in turn. The ratio is
that of the medians of the time per token during the loads and in the pauses between them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.rolls import Clients
from benchmarks.harness.server import Served, running_server
from benchmarks.harness.stalls import wait_until
from benchmarks.report.results import table
from cluster.launch.model_source import bundled_checkpoint

FIRST, SECOND = "first", "second"
_PROMPT = list(range(10, 42))


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Sizes of the measurement."""

    num_loads: int = 5
    num_streams: int = 2
    num_tokens: int = 256
    """Output tokens of a request."""
    pause_s: float = 10.0
    """Time between two loads, in which the first model alone is measured."""


QUICK = Case(num_loads=1, num_tokens=32, pause_s=1.0)
"""Enough to see that everything runs."""


@dataclass(slots=True)
class Periods:
    """Periods of monotonic time, by what happened in them."""

    loads: list[tuple[float, float]] = field(default_factory=list)
    pauses: list[tuple[float, float]] = field(default_factory=list)


def measure(case: Case) -> tuple[Clients, Periods]:
    """Load the second model some times. Raises ``RuntimeError`` if a request fails."""
    body = {"model": FIRST, "prompt": _PROMPT, "max_tokens": case.num_tokens}
    body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    words = (str(bundled_checkpoint()), "--served-model-name", FIRST, "--kv-cache-bytes", "16M")
    periods = Periods()
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder), *words) as server:
        wait_until(lambda: "models" in server.admin("GET", "models").json(), "the table of models")
        clients = Clients(server.http, body)
        with clients.running(case.num_streams):
            for _ in range(case.num_loads):
                began_s = time.monotonic()
                time.sleep(case.pause_s)
                load_s = time.monotonic()
                periods.pauses.append((began_s, load_s))
                _order(server, "load", path=str(bundled_checkpoint()))
                wait_until(lambda: _states(server) == ["READY"], "the second model")
                periods.loads.append((load_s, time.monotonic()))
                _order(server, "unload")
                wait_until(lambda: not _states(server), "the end of the second model")
    if clients.failures:
        raise RuntimeError(f"{len(clients.failures)} requests failed: {clients.failures[0]}")
    return clients, periods


def _order(server: Served, kind: str, **body: str) -> None:
    found = server.admin("POST", f"models/{kind}", model=SECOND, **body).json()
    if "models" not in found:
        raise RuntimeError(f"{kind}: {found}")


def _states(server: Served) -> list[str]:
    models = server.admin("GET", "models").json()["models"]
    return [r["state"] for model in models if model["name"] == SECOND for r in model["revisions"]]


def token_times(clients: Clients, periods: Sequence[tuple[float, float]]) -> list[float]:
    """Return the mean times between two tokens, in seconds, of the requests within a period.

    A mean over a request, as several tokens may arrive at once while the machine is busy.
    """
    return [
        statistics.fmean(answer.gaps)
        for answer in clients.answers
        if any(begin <= answer.times[0] and answer.times[-1] < end for begin, end in periods)
    ]


def report(clients: Clients, periods: Periods) -> str:
    """Return the table."""
    alone, loading = (token_times(clients, each) for each in (periods.pauses, periods.loads))
    rows = [
        [name, str(len(each)), *(f"{1e3 * value:.1f}" for value in _quantiles(each))]
        for name, each in (("alone", alone), ("while the second loads", loading))
    ]
    ratio = statistics.median(loading) / statistics.median(alone)
    took = statistics.median(end - begin for begin, end in periods.loads)
    heads = ["first model", "requests", "time per token, p50, ms", "p90, ms"]
    return f"{table(heads, rows)}\n\nRatio of the medians {ratio:.2f}; a load took {took:.1f} s."


def _quantiles(values: Sequence[float]) -> tuple[float, float]:
    parts = statistics.quantiles(values, n=10)
    return parts[4], parts[8]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults.second_model", description=__doc__
    )
    parser.add_argument("--quick", action="store_true", help="one load")
    parser.add_argument("--loads", type=int, default=Case().num_loads)
    parser.add_argument("--streams", type=int, default=Case().num_streams)
    options = parser.parse_args(arguments)
    case = Case(num_loads=options.loads, num_streams=options.streams)
    sys.stdout.write(f"{report(*measure(QUICK if options.quick else case))}\n")


if __name__ == "__main__":
    main()
