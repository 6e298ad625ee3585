"""Pause of a stream when its request moves to another attention worker, by prompt length.

2 attention workers and 1 expert worker run on a private Ray. While a stream decodes, its worker is
drained, so that the request moves; a new worker then takes its place. The pause is the time between
the last token from the old worker and the first one from the new worker. The other columns have the
median and the longest time between tokens before the drain, and the longest one during it. With
``kv_fetch_limit_s`` 0 the new worker computes the whole context again.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.faults.load import wait
from benchmarks.faults.site import Site
from benchmarks.harness.cluster_gateway import ClusterGateway, gateway_of
from benchmarks.harness.serving_cluster import RayCluster, connected_ray, make_config, serving
from benchmarks.report.quiet import wait_until_quiet
from benchmarks.report.results import table
from benchmarks.report.svg import Line, line_chart
from benchmarks.serving.throughput import TINY, random_model
from gateway.core.call import CallKind, GenerateCall
from gateway.engines.submission import Submission

PLOT = Path(__file__).resolve().parents[2] / "docs" / "reference" / "moves.svg"
"""The plot of pauses by prompt length, written by a full run."""
LIMIT_MS = 20.0
"""Required: a pause of at most this time, or of two decode steps if they take longer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Sizes of the measurement."""

    lengths: tuple[int, ...] = (250, 500, 1000, 2000, 3600)
    """Prompt lengths in tokens."""
    tokens_before: int = 60
    """Output tokens before the drain starts."""
    tokens_after: int = 240
    """Output tokens after the drain has started, until a new worker has started."""
    repeats: int = 5
    """Drains for each prompt length."""
    patience_s: float = 10.0
    """Longest wait for a quiet machine before a drain."""


QUICK = Case(lengths=(40,), tokens_before=4, tokens_after=600, repeats=1, patience_s=0.0)
"""Enough to see that everything runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drained:
    """Times between two tokens of one stream, in ms."""

    usual_ms: float
    """Median before the drain."""
    slowest_ms: float
    """Longest before the drain."""
    pause_ms: float
    """Time during which the request moved."""
    longest_ms: float
    """Longest during the drain, until the worker has left the generation."""


def section(quick: bool) -> str:
    """Return the Markdown section."""
    case = QUICK if quick else Case()
    with random_model(TINY if quick else RandomModel()) as checkpoint:
        found = {
            "KV fetched": dict(measure(checkpoint, case, 2.0)),
            "KV computed again": dict(measure(checkpoint, case, 0.0)),
        }
    if not quick:
        PLOT.write_text(plot(found["KV fetched"]))
    return f"## Moved requests\n\n{_words(case)}\n\n{report(case, found)}"


def measure(
    checkpoint: Path, case: Case, fetch_limit_s: float
) -> Iterator[tuple[int, list[Drained]]]:
    """Yield each prompt length with its drains."""
    engine = {"kv_cache_bytes": 256 << 20, "kv_fetch_limit_s": fetch_limit_s}
    config = make_config(checkpoint, 2, 1, engine=engine)
    with (
        connected_ray(),
        serving(RayCluster(config)) as cluster,
        gateway_of(cluster) as gateway,
    ):
        assert isinstance(cluster, RayCluster)
        for length in case.lengths:
            runs = []
            for repeat in range(case.repeats):
                _wait_whole(cluster, gateway)
                wait_until_quiet(case.patience_s)
                runs.append(_drain(cluster, gateway, case, length, seed=1000 * length + repeat))
            yield length, runs


def _drain(
    cluster: RayCluster, gateway: ClusterGateway, case: Case, length: int, seed: int
) -> Drained:
    """Run one stream and drain its worker."""
    rng = random.Random(seed)
    call = GenerateCall(
        kind=CallKind.COMPLETION,
        prompts=(tuple(rng.randrange(4, 1000) for _ in range(length)),),
        max_tokens=case.tokens_before + case.tokens_after,
        ignore_eos=True,
        token_ids_only=True,
        seed=seed,
    )
    streams = gateway.stream([call], f"drained-{seed}")
    streams.wait_tokens(case.tokens_before)
    (worker,) = (c.worker for c in gateway.engines.clients if c.submissions)
    with _resubmissions(gateway) as moved_at:
        ordered_at = time.monotonic()
        Site(cluster, rng).drain(worker)
        ended_at = time.monotonic()
        (answer,) = streams.finish()
    gaps = [(end, 1000 * (end - begin)) for begin, end in pairwise(answer.times)]
    before = [gap for end, gap in gaps if end < ordered_at]
    during = [gap for end, gap in gaps if ordered_at <= end and end - gap / 1000 <= ended_at]
    (pause,) = (gap for end, gap in gaps if end - gap / 1000 <= moved_at[0] < end)
    return Drained(
        usual_ms=statistics.median(before),
        slowest_ms=max(before),
        pause_ms=pause,
        longest_ms=max(during),
    )


@contextmanager
def _resubmissions(gateway: ClusterGateway) -> Iterator[list[float]]:
    """Yield a list that gets the ``time.monotonic`` of each move to another worker."""
    times: list[float] = []
    count = gateway.engines.on_resubmit

    def note(entry: Submission) -> None:
        times.append(time.monotonic())
        count(entry)

    gateway.engines.on_resubmit = note
    try:
        yield times
    finally:
        gateway.engines.on_resubmit = count


def _wait_whole(cluster: RayCluster, gateway: ClusterGateway) -> None:
    """Wait until both attention workers serve and the gateway is connected to them."""
    cluster.wait(lambda s: s["state"] == "SERVING")
    wait(lambda: len(gateway.engines.clients) == 2, "a stream to the new worker")


def report(case: Case, found: Mapping[str, Mapping[int, list[Drained]]]) -> str:
    """Return the table with a row for each prompt length."""
    rows = []
    for length in case.lengths:
        row = [str(length)]
        for by_length in found.values():
            runs = by_length[length]
            row.append(f"{statistics.median(r.usual_ms for r in runs):.1f}")
            row.append(f"{statistics.median(r.slowest_ms for r in runs):.1f}")
            pauses = [r.pause_ms for r in runs]
            row.append(f"{statistics.median(pauses):.1f} / {max(pauses):.1f}")
            row.append(f"{statistics.median(r.longest_ms for r in runs):.1f}")
        rows.append(row)
    heads = ["prompt tokens"]
    for name in found:
        heads += [f"{name}: median before", f"{name}: longest before"]
        heads += [f"{name}: pause, median / worst", f"{name}: longest during the drain"]
    return table(heads, rows)


def plot(found: Mapping[int, list[Drained]]) -> str:
    """Plot median pauses of moved requests and the limit by prompt length, as SVG."""
    pauses = {length: statistics.median(r.pause_ms for r in runs) for length, runs in found.items()}
    steps = {length: statistics.median(r.usual_ms for r in runs) for length, runs in found.items()}
    lines = [
        Line("pause of a move", tuple(pauses.items())),
        Line("limit", tuple((n, max(LIMIT_MS, 2 * step)) for n, step in steps.items())),
        Line("between two tokens", tuple(steps.items())),
    ]
    return line_chart(lines, x="tokens of the prompt", y="ms")


def _words(case: Case) -> str:
    return (
        "A drain of an attention worker moves its requests to another worker. The table has times "
        "between two tokens of a stream in ms, before and during the drain of its worker, and the "
        "pause of the move itself. The new worker fetches the KV blocks of the request, or "
        "computes them again. The cluster has 2 attention workers and 1 expert worker, which share "
        f"two cores; each row has {case.repeats} drains."
    )
