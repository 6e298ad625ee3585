"""The pause of a stream whose attention worker is drained, by the length of its context.

2 attention workers and 1 expert worker on a private Ray. A stream decodes; its worker is drained
(and another one starts in its place afterwards). The pause is the time between the two tokens
between which the stream goes over, and is shown beside the usual time between tokens, the longest
one before the order, and the longest one after it. Without fetching (``kv_fetch_limit_s`` 0) the
other worker computes the whole context again.
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
"""Pauses by length, drawn by a full run."""
LIMIT_MS = 20.0
"""Asked for: the longest pause, or two decode steps if they take longer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is measured."""

    lengths: tuple[int, ...] = (250, 500, 1000, 2000, 3600)
    """Tokens of the prompt."""
    tokens_before: int = 60
    """Tokens that come before the order."""
    tokens_after: int = 240
    """Tokens that come after it, while the worker leaves and another one starts."""
    repeats: int = 5
    """Drains of each length."""
    patience_s: float = 10.0
    """Longest wait for a quiet machine before a drain."""


QUICK = Case(lengths=(40,), tokens_before=4, tokens_after=600, repeats=1, patience_s=0.0)
"""Enough to see that everything runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drained:
    """Times of one stream between its tokens, in ms."""

    usual_ms: float
    """Median before the order."""
    slowest_ms: float
    """Longest before the order."""
    pause_ms: float
    """Of the token before which the stream went over."""
    longest_ms: float
    """Longest after the order, until the worker has left the generation."""


def section(quick: bool) -> str:
    """The section of its page."""
    case = QUICK if quick else Case()
    with random_model(TINY if quick else RandomModel()) as checkpoint:
        found = {
            "blocks fetched ahead": dict(measure(checkpoint, case, 2.0)),
            "computed again": dict(measure(checkpoint, case, 0.0)),
        }
    if not quick:
        PLOT.write_text(plot(found["blocks fetched ahead"]))
    return f"## Moved requests\n\n{_words(case)}\n\n{report(case, found)}"


def measure(
    checkpoint: Path, case: Case, fetch_limit_s: float
) -> Iterator[tuple[int, list[Drained]]]:
    """Drains by length."""
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
    """One stream, and the drain of its worker."""
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
    """Gets the ``time.monotonic`` at which requests go to another worker."""
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
    """Wait until both attention workers serve, and the gateway has streams to them."""
    cluster.wait(lambda s: s["state"] == "SERVING")
    wait(lambda: len(gateway.engines.clients) == 2, "a stream to the new worker")


def report(case: Case, found: Mapping[str, Mapping[int, list[Drained]]]) -> str:
    """A row for each length: medians and the worst of the repeats."""
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
    heads = ["prompt"]
    for name in found:
        heads += [f"{name}: usual", "slowest before", "pause, median / worst", "slowest until left"]
    return table(heads, rows)


def plot(found: Mapping[int, list[Drained]]) -> str:
    """Median pauses of moved requests by length, beside what was asked for, as SVG."""
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
        "Time between two tokens of a stream in ms, before its attention worker is drained "
        f"(2 + 1 workers, a core for two of them) and while it leaves; {case.repeats} drains each."
    )
