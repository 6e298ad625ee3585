"""Pauses of streams while workers are added and removed.

python -m benchmarks.faults.scaling [--quick]

1 + 2 workers on a private Ray are scaled to 2 + 3 and back, with a few and with many streams. The
pause is the longest time between two tokens of any stream during the operation. For comparison, a
row has the longest time between tokens in the seconds before the operation, the median time, which
is that of a decode step, and the time in which the new generation formed, from the cluster history.
On few cores, starting workers compete with serving workers: compare pause and step within a row.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from benchmarks.faults.layouts import row_config
from benchmarks.faults.load import FaultLoad, Load, wait
from benchmarks.harness.cluster_gateway import gateway_of
from benchmarks.harness.serving_cluster import RayCluster, ServingCluster, connected_ray, serving
from benchmarks.report.quiet import wait_until_quiet
from benchmarks.report.results import table
from gateway.core.call import CallKind, GenerateCall

ASKED_S = 0.5
"""Longest allowed pause."""
_PROMPT = tuple(range(10, 42))
_LIMIT_S = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Sizes of the measurement."""

    num_streams: tuple[int, ...] = (4, 16)
    repeats: int = 10
    before_s: float = 5.0
    """Time before each operation in which pauses of the machine itself are measured."""
    max_tokens: int = 400
    patience_s: float = 20.0
    """Longest wait for a quiet machine before a repetition."""


QUICK = Case(num_streams=(2,), repeats=1, before_s=0.5, max_tokens=64, patience_s=0.0)
"""Enough to see that everything runs."""
UP = {"attention": 2, "expert": 3}
DOWN = {"attention": 1, "expert": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaled:
    """Times of one scale operation in seconds."""

    step_s: float
    """Median time between two tokens before the operation."""
    before_s: float
    """Longest time between two tokens before the operation."""
    pause_s: float
    """Longest time between two tokens during the operation."""
    change_s: float
    """Longest change of the generation in this operation, from the history."""
    took_s: float
    """Time of the whole operation."""


def section(quick: bool) -> str:
    """Return the Markdown section."""
    case = QUICK if quick else Case()
    return f"## Scaling\n\n{_words(case)}\n\n{report(measure(case))}"


def measure(case: Case) -> dict[tuple[int, str], list[Scaled]]:
    """Measure by number of streams and direction. Raises ``RuntimeError`` if a call fails."""
    found: dict[tuple[int, str], list[Scaled]] = {}
    with (
        connected_ray(),
        serving(RayCluster(row_config(1, 2))) as cluster,
        gateway_of(cluster) as gateway,
    ):
        for number in case.num_streams:
            load = FaultLoad(gateway, calls(number, case.max_tokens))
            for _ in range(case.repeats):
                wait_until_quiet(case.patience_s)
                with load.running():
                    load.wait_deltas(4)
                    for name, counts in (("up", UP), ("down", DOWN)):
                        scaled = _scale(cluster, load, case, counts)
                        found.setdefault((number, name), []).append(scaled)
            if load.failures:
                raise RuntimeError(f"{len(load.failures)} calls failed: {load.failures[0]}")
    return found


def calls(num_streams: int, max_tokens: int) -> list[GenerateCall]:
    """Calls with different prompts and ``max_tokens`` output tokens each."""
    call = GenerateCall(
        kind=CallKind.COMPLETION, prompts=(), max_tokens=max_tokens, ignore_eos=True, seed=1
    )
    return [replace(call, prompts=((i, *_PROMPT),), seed=i) for i in range(4, 4 + num_streams)]


def _scale(cluster: ServingCluster, load: FaultLoad, case: Case, counts: dict[str, int]) -> Scaled:
    time.sleep(case.before_s)
    known = cluster.snapshot()["generation"]
    ordered_at = time.monotonic()
    begun = cluster.call("begin", "scale", {**counts, "limit_s": _LIMIT_S})
    ended: dict[str, Any] = {}

    def is_over() -> bool:
        ended.update(cluster.call("operation", begun["id"]))
        return bool(ended["state"] != "RUNNING")

    wait(is_over, "the end of a scaling", _LIMIT_S + 10.0)
    if ended["state"] != "SUCCEEDED":
        raise RuntimeError(str(ended["message"]))
    load.wait_deltas(2)
    ended_at = time.monotonic()
    return Scaled(
        step_s=statistics.median(gaps(load, ordered_at - case.before_s, ordered_at)),
        before_s=load.longest_pause(ordered_at - case.before_s, ordered_at),
        pause_s=load.longest_pause(ordered_at, ended_at),
        change_s=longest_change(cluster.snapshot()["history"], known),
        took_s=ended_at - ordered_at,
    )


def gaps(load: Load, since: float, until: float) -> Iterator[float]:
    """Yield the times between two tokens of a call that start from ``since`` until ``until``."""
    for line in load.lines:
        for times in list(line.calls):
            yield from (b - a for a, b in pairwise(list(times)) if since <= b < until)


def longest_change(history: Sequence[dict[str, Any]], after: int) -> float:
    """Longest change to a generation after ``after``, from the history; 0 if unknown."""
    pauses = [e["took_s"] or 0.0 for e in history if e["generation"] > after]
    return max(pauses, default=0.0)


def report(found: dict[tuple[int, str], list[Scaled]]) -> str:
    """Return the table with a row for each number of streams and direction."""
    heads = [
        *("streams", "attention + expert workers", "step, ms"),
        *("longest before, median / worst, ms", "pause, median / worst, ms", "pause in steps"),
        *("generation change, median / worst, ms", "whole operation, s", "pauses above 0.5 s"),
    ]
    rows = []
    for (number, name), runs in found.items():
        steps = statistics.median(r.step_s for r in runs)
        pauses = [r.pause_s for r in runs]
        rows.append(
            [
                str(number),
                "1 + 2 to 2 + 3" if name == "up" else "2 + 3 to 1 + 2",
                f"{1e3 * steps:.1f}",
                _both(runs, lambda r: r.before_s),
                _both(runs, lambda r: r.pause_s),
                f"{statistics.median(r.pause_s / r.step_s for r in runs):.1f}",
                _both(runs, lambda r: r.change_s),
                f"{statistics.median(r.took_s for r in runs):.1f}",
                f"{sum(p > ASKED_S for p in pauses)} of {len(pauses)}",
            ]
        )
    return table(heads, rows)


def _both(runs: Sequence[Scaled], value: Callable[[Scaled], float]) -> str:
    values = [1e3 * value(run) for run in runs]
    return f"{statistics.median(values):.0f} / {max(values):.0f}"


def _words(case: Case) -> str:
    return (
        "A pause is the longest time between two tokens of one stream while a scale operation "
        f"starts, adds and removes workers; each row has {case.repeats} operations. A step is the "
        "median time between two tokens before the operation, and *longest before* the longest one "
        f"in the {case.before_s:g} s before it."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults.scaling", description=__doc__
    )
    parser.add_argument("--quick", action="store_true", help="one repetition")
    parser.add_argument("--repeats", type=int, default=Case().repeats)
    options = parser.parse_args(arguments)
    case = QUICK if options.quick else Case(repeats=options.repeats)
    sys.stdout.write(f"{report(measure(case))}\n")


if __name__ == "__main__":
    main()
