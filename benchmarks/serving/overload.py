"""Ten times the sustainable rate: what is accepted, what is refused, and how soon.

python -m benchmarks.serving.overload [--seconds 60]

``expertmesh serve`` with the bundled model and two keys. First the peak, the rate that clients
without pauses reach. The sustainable rate is 0.7 of it; its latency is normal. Then requests arrive
at random (Poisson) at ten times the sustainable rate, a tenth of them over gRPC, and at that rate
again: single short requests beside them show when the latency is as before. Then the fairness: a
modest key at 0.3 of the peak, while another one asks for as much, for what is left of the
sustainable rate, for what is left of the peak, and for ten times the sustainable rate.
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
"""Of the peak."""
OVER = 10 * SUSTAINABLE
"""Of the peak."""
NORMAL = 1.5
"""Times the latency before the overload, up to which it is normal."""
_NUM_EAGER = 66
"""Clients without pauses: more than run at once, and too few to be refused."""
MODEST_SHARE = 0.3
"""Of the peak."""
OTHERS = (MODEST_SHARE, SUSTAINABLE - MODEST_SHARE, 1 - MODEST_SHARE, OVER)
"""Of the other key, beside the modest one."""
_MOST_TOKENS = 640
"""Of a request in the mean: one and a half times as many fit into the context."""
_RAMP_S = 5.0
"""Time until all places are taken."""
_WINDOW_S = 1.0
"""Of the median that must be normal."""
_NUM_RETRIES = 10
"""Refused requests that are sent again as they were told."""
_GROWN_MIB = 8.0


@dataclass(slots=True)
class Found:
    """All phases, and what was seen beside them."""

    peak: Phase
    peak_after: Phase
    """After the overload: the machine's speed changes."""
    before: Phase
    """Single requests at the sustainable rate, like ``after``."""
    over: Phase
    after: Phase
    beside: list[Phase]
    """The modest key beside each of ``OTHERS``."""
    mean_tokens: int
    retries: list[str]
    most_waiting: int
    grown: list[str]
    """Processes that grew under overload."""

    @property
    def peak_rate(self) -> float:
        """Requests a second."""
        return self.peak.tokens_per_s / self.mean_tokens

    @property
    def over_share(self) -> float:
        """Tokens a second under overload, of the mean of both peaks."""
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
    """All phases."""
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
    before = await probed("single ones at the sustainable rate, before", min(seconds, 20.0))
    await clients.settle()
    memory = _memory(server)
    watcher = asyncio.create_task(clients.watch_queue())
    over = await clients.poisson("10 times that", {GREEDY: OVER * rate}, ramp_s, seconds)
    watcher.cancel()
    last = over.refusals[-_NUM_RETRIES:]
    retrying = asyncio.create_task(clients.retry(last))
    after = await probed("single ones at the sustainable rate, after", min(seconds, 20.0))
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
    """The modest key beside the other one with a share of the peak, to the last answer."""
    rates = {GREEDY: share * peak_rate, MODEST: MODEST_SHARE * peak_rate}
    name = f"the other key at {share:.1f} of the peak"
    phase = await clients.poisson(name, rates, ramp_s, seconds)
    await clients.settle()
    return phase


def _memory(server: Served) -> dict[int, tuple[str, float]]:
    """Process id -> name and unique memory in MiB."""
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
    """What was asked for, and what was found."""
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
        ["tokens/s, of the peak", "at least 95%", f"{found.over_share:.0%}"],
        ["refusal, median", "under 50 ms", f"{_median(refused_ms):.0f} ms"],
        ["answers but 200, 429, OK, RESOURCE_EXHAUSTED, cut, or no retry time", "0", f"{others}"],
        ["retry time, median", "1 to 60 s", f"{_median(retry_s):.1f} s"],
        [f"last {len(found.retries)} refused, sent again as told: accepted", "", f"{accepted}"],
        ["sequences that waited at the worker, at most", "bounded", f"{found.most_waiting}"],
        [f"processes that grew by over {_GROWN_MIB:.0f} MiB", "0", "; ".join(found.grown) or "0"],
        ["TTFT normal again after", "5 s", "never" if normal_s is None else f"{normal_s:.1f} s"],
        *(
            [
                f"TTFT of the modest key, the other one at {OVER:.1f} / {share:.1f} of the peak",
                "at most 1.5",
                f"{unfair_ms / ms:.2f}",
            ]
            for share, ms in zip(OTHERS[:-1], fair_ms, strict=True)
        ),
    ]


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


def report(found: Found) -> str:
    """What was asked for, and a row for each phase."""
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
    head = ["requests", "accepted", "refused", f"of {MODEST}", "tokens/s"]
    head += [f"TTFT of {key}, ms" for key in (GREEDY, MODEST)]
    over = found.over.end_s - found.over.begin_s
    return (
        f"The peak is {found.peak_rate:.1f} requests a second, with {found.mean_tokens} tokens on "
        f"average. The sustainable rate is {SUSTAINABLE} of it, and the overload is ten times that "
        f"rate for {over:.0f} s, after {min(_RAMP_S, over):.0f} s in which the places fill. Times "
        f"are medians; latency is normal up to {NORMAL} times that before.\n\n"
        f"{table(['', 'limit', 'found'], _asked(found))}\n\n{table(head, rows)}"
    )


def run(seconds: float) -> str:
    """A server of its own, and the report."""
    with tempfile.TemporaryDirectory(prefix="em") as folder:
        keys = Path(folder) / "keys.json"
        entries = [{"name": n, "key": n, "max_concurrent": 100_000} for n in (GREEDY, MODEST)]
        keys.write_text(json.dumps({"keys": entries}))
        limit = ("--max-queue-wait-s", f"{GatewaySection().max_queue_wait_s:g}")  # as shipped
        with running_server(Path(folder), "--api-key-file", str(keys), *limit) as server:
            return report(asyncio.run(measure(server, seconds)))


def section(quick: bool) -> str:
    """The section of its page."""
    return f"## Overload\n\n{run(3.0 if quick else 60.0)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.overload", description=__doc__
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of the overload")
    sys.stdout.write(f"{run(parser.parse_args(arguments).seconds)}\n")


if __name__ == "__main__":
    main()
