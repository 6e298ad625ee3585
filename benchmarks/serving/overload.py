"""Load of ten times the sustainable rate: throughput, rejections and latency.

python -m benchmarks.serving.overload [--seconds 60]

``expertmesh serve`` serves the bundled model to two API keys. Clients without pauses show the peak
rate; the sustainable rate is 0.7 of it. Then requests arrive at random (Poisson), a tenth of them
over gRPC, at the sustainable rate, at ten times this rate, and at the sustainable rate again. Probe
requests in the first and last of these phases show when the latency is normal again. Last, for
fairness, one key sends 0.3 of the peak while the other key sends 0.3 to 7 times the peak.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.harness.processes import name_of
from benchmarks.harness.server import Served, running_server
from benchmarks.report.results import table
from benchmarks.serving.overload_load import GREEDY, MODEST, MOST_REQUESTS_PER_S, Clients, Phase
from cluster.config.gateway import GatewaySection
from cluster.launch.orphans import find_by_files

SUSTAINABLE = 0.7
"""Sustainable rate as a fraction of the peak."""
OVER = 10 * SUSTAINABLE
"""Rate of the overload as a multiple of the peak."""
NORMAL = 1.5
"""Highest ratio of TTFT to the TTFT before the overload at which TTFT is normal."""
_NUM_EAGER = 66
"""Clients without pauses: more than the seats of the worker, too few to be rejected."""
MODEST_SHARE = 0.3
"""Rate of the modest key as a fraction of the peak."""
OTHERS = (MODEST_SHARE, SUSTAINABLE - MODEST_SHARE, 1 - MODEST_SHARE, OVER)
"""Rates of the greedy key beside the modest key, as fractions of the peak."""
_MOST_TOKENS = 640
"""Most tokens of a mean request; the longest request has 1.5 times as many and must fit."""
_RAMP_S = 5.0
"""Time until all seats are taken."""
_WINDOW_S = 1.0
"""Length of the window of which the median must be normal."""
_NUM_RETRIES = 10
"""Number of rejected requests that are sent again after their retry time."""
_GROWN_MIB = 8.0


@dataclass(slots=True)
class Found:
    """Results of all phases."""

    peak: Phase
    peak_after: Phase
    """Measured after the overload, because the machine's speed changes."""
    before: Phase
    """Probe requests beside the sustainable rate, like ``after``."""
    over: Phase
    after: Phase
    beside: list[Phase]
    """One phase for each rate of ``OTHERS``."""
    mean_tokens: int
    retries: list[str]
    most_waiting: int
    grown: list[str]
    """Descriptions of the processes that grew under overload."""

    @property
    def peak_rate(self) -> float:
        """Peak rate in requests a second."""
        return self.peak.tokens_per_s / self.mean_tokens

    @property
    def over_share(self) -> float:
        """Tokens a second under overload divided by the mean of both peaks."""
        peaks = statistics.mean(phase.tokens_per_s for phase in (self.peak, self.peak_after))
        return self.over.tokens_per_s / peaks


def normal_after(before_ms: float, after: Sequence[tuple[float, float]]) -> float | None:
    """Seconds until the median of a window is normal; None if none is.

    ``after``: seconds since the overload at which requests were sent, and their TTFT in ms.
    """
    for start_s, _ in after:
        window = [ms for at_s, ms in after if start_s <= at_s < start_s + _WINDOW_S]
        if statistics.median(window) <= NORMAL * before_ms:
            return start_s
    return None


async def measure(server: Served, seconds: float) -> Found:
    """Run all phases."""
    clients = Clients(server, seed=1)
    ramp_s = min(_RAMP_S, seconds)
    await clients.eager(_NUM_EAGER, 0.0, ramp_s)  # warm
    first = await clients.eager(_NUM_EAGER, ramp_s / 2, ramp_s)
    mean = round(first.tokens_per_s * OVER / MOST_REQUESTS_PER_S)
    clients.mean_tokens = min(mean, _MOST_TOKENS)
    peak = await clients.eager(_NUM_EAGER, ramp_s, seconds / 2)
    rate = peak.tokens_per_s / clients.mean_tokens
    sustainable = {GREEDY: SUSTAINABLE * rate}

    async def probed(name: str, probe_s: float) -> Phase:
        load = asyncio.create_task(clients.poisson(name, sustainable, 0.0, probe_s + 1.0))
        phase = await clients.probe(name, GREEDY, probe_s)
        await load
        return phase

    await clients.poisson("ramp", sustainable, 0.0, 2 * ramp_s)
    before = await probed("probes beside the sustainable rate, before", min(seconds, 20.0))
    await clients.settle()
    memory = _memory(server)
    watcher = asyncio.create_task(clients.watch_queue())
    over = await clients.poisson(
        "10 times sustainable rate", {GREEDY: OVER * rate}, ramp_s, seconds
    )
    watcher.cancel()
    last = over.refusals[-_NUM_RETRIES:]
    retrying = asyncio.create_task(clients.retry(last))
    after = await probed("probes beside the sustainable rate, after", min(seconds, 20.0))
    retries = await retrying
    await clients.settle()
    grown = _grown(memory, _memory(server))
    peak_after = await clients.eager(_NUM_EAGER, ramp_s, seconds / 2)
    beside = [await _beside(clients, share, rate, ramp_s, seconds / 2) for share in OTHERS]
    await clients.close()
    return Found(
        peak=peak,
        peak_after=peak_after,
        before=before,
        over=over,
        after=after,
        beside=beside,
        mean_tokens=clients.mean_tokens,
        retries=retries,
        most_waiting=clients.most_waiting,
        grown=grown,
    )


async def _beside(
    clients: Clients, share: float, peak_rate: float, ramp_s: float, seconds: float
) -> Phase:
    """Run both keys, the greedy one at ``share`` of the peak, until the last response."""
    rates = {GREEDY: share * peak_rate, MODEST: MODEST_SHARE * peak_rate}
    name = f"modest at {MODEST_SHARE}, greedy at {share:.1f} of the peak"
    phase = await clients.poisson(name, rates, ramp_s, seconds)
    await clients.settle()
    return phase


def _memory(server: Served) -> dict[int, tuple[str, float]]:
    """Process id -> name and unique set size in MiB."""
    found = {}
    for entry in find_by_files(server.folder):
        with suppress(psutil.Error):
            process = psutil.Process(entry.pid)
            found[entry.pid] = name_of(process), process.memory_full_info().uss / 2**20
    return found


def _grown(before: dict[int, tuple[str, float]], after: dict[int, tuple[str, float]]) -> list[str]:
    return [
        f"{name} {before[pid][1]:.0f} -> {mib:.0f} MiB"
        for pid, (name, mib) in sorted(after.items())
        if pid in before and mib > before[pid][1] + _GROWN_MIB
    ]


def _asked(found: Found) -> list[list[str]]:
    """Rows of the table with the limits."""
    over = found.over
    refused_ms = [refusal.took_ms for refusal in over.refusals]
    retry_s = [refusal.retry_s for refusal in over.refusals if refusal.retry_s is not None]
    before_ms = found.before.median_ttft_ms(GREEDY)
    sent = [(at_s - over.end_s, ms) for at_s, ms in found.after.ttft_ms[GREEDY]]
    normal_s = normal_after(before_ms, sent)
    accepted = found.retries.count("200") + found.retries.count("OK")
    *fair_ms, unfair_ms = [phase.median_ttft_ms(MODEST) for phase in found.beside]
    others = over.num_other + over.num_cut + len(over.refusals) - len(retry_s)
    return [
        ["tokens/s, percent of the peak", "at least 95%", f"{found.over_share:.0%}"],
        ["time to a rejection, median", "under 50 ms", f"{_median(refused_ms):.0f} ms"],
        ["other statuses, cut streams, rejections without a retry time", "0", f"{others}"],
        ["retry time of a rejection, median", "1 to 60 s", f"{_median(retry_s):.1f} s"],
        [
            f"accepted when sent again, of the last {len(found.retries)} rejected requests",
            "",
            f"{accepted}",
        ],
        ["largest number of waiting sequences at the worker", "bounded", f"{found.most_waiting}"],
        [f"processes that grew by over {_GROWN_MIB:.0f} MiB", "0", "; ".join(found.grown) or "0"],
        ["TTFT is normal again after", "5 s", "never" if normal_s is None else f"{normal_s:.1f} s"],
        *(
            [
                f"modest's TTFT with greedy at {OVER:.1f} of the peak, divided by its TTFT with "
                f"greedy at {share:.1f}",
                "at most 1.5",
                f"{unfair_ms / ms:.2f}",
            ]
            for share, ms in zip(OTHERS[:-1], fair_ms, strict=True)
        ),
    ]


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


def report(found: Found) -> str:
    """Return the tables: limits and results, and a row for each phase."""
    phases = [found.peak, found.before, found.over, found.after, found.peak_after, *found.beside]
    rows = [
        [
            phase.name,
            f"{phase.num_accepted}",
            f"{phase.num_refused}",
            f"{phase.num_refused_of(MODEST)}",
            f"{phase.tokens_per_s:.0f}",
            *(f"{phase.median_ttft_ms(key):.0f}" for key in (GREEDY, MODEST)),
        ]
        for phase in phases
    ]
    head = ["phase", "accepted requests", "rejected", f"rejected of {MODEST}", "tokens/s"]
    head += [f"median TTFT of {key}, ms" for key in (GREEDY, MODEST)]
    over = found.over.end_s - found.over.begin_s
    return (
        f"Two API keys, {GREEDY} and {MODEST}, send requests to the bundled model. The peak is the "
        f"rate of {_NUM_EAGER} clients without pauses: {found.peak_rate:.1f} requests a second, "
        f"{found.mean_tokens} tokens on average. The sustainable rate is {SUSTAINABLE} of the "
        f"peak; the overload is ten times the sustainable rate for {over:.0f} s, after a ramp of "
        f"{min(_RAMP_S, over):.0f} s that does not count. TTFT (time to first token) is normal up "
        f"to {NORMAL} times the median before the overload. Probes are single requests for one "
        "token, sent during the load; the rows of probes count only these requests. In the second "
        f"table, {MODEST} at {MODEST_SHARE} means that this key sends {MODEST_SHARE} of the peak "
        "rate; nan: the key sent no request.\n\n"
        f"{table(['during and after the overload', 'limit', 'measured'], _asked(found))}\n\n"
        f"{table(head, rows)}"
    )


def run(seconds: float) -> str:
    """Start a server, run all phases and return the report."""
    with tempfile.TemporaryDirectory(prefix="em") as folder:
        keys = Path(folder) / "keys.json"
        entries = [{"name": n, "key": n, "max_concurrent": 100_000} for n in (GREEDY, MODEST)]
        keys.write_text(json.dumps({"keys": entries}))
        limit = ("--max-queue-wait-s", f"{GatewaySection().max_queue_wait_s:g}")  # as shipped
        with running_server(Path(folder), "--api-key-file", str(keys), *limit) as server:
            return report(asyncio.run(measure(server, seconds)))


def section(quick: bool) -> str:
    """Return the Markdown section."""
    return f"## Overload\n\n{run(3.0 if quick else 60.0)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.overload", description=__doc__
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the overload")
    sys.stdout.write(f"{run(parser.parse_args(arguments).seconds)}\n")


if __name__ == "__main__":
    main()
