"""Throughput and latency of a cluster that rebalances after its load shifts to another domain.

Expert workers are paced: they wait for a given time for each activated slot and each token, because
on shared cores an uneven load costs no time.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.checkpoints.domain_checkpoint import DomainModel, write
from benchmarks.harness.ray_serving import FOLDER_VARIABLE
from benchmarks.report.quiet import wait_until_quiet
from benchmarks.report.results import table
from benchmarks.report.svg import Line, Mark, line_chart
from cluster.core.load_profile import LoadProfile
from cluster.launch.local_ray import make_temp_dir, private_environment
from cluster.planner import mesh
from cluster.planner.base import PlannedTopology, PlanOptions

PLOT = Path(__file__).resolve().parents[2] / "docs" / "explanation" / "rebalancing.svg"
"""Throughput over time, drawn by a full run."""
_BIN_S = 1.0
_LIMIT_S = 400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Sizes of the measurement."""

    model: DomainModel = field(
        default_factory=lambda: DomainModel(
            tokens_a_domain=64, layers=4, experts=32, top_k=4, ffn=256, skew=2.0, seed=2
        )
    )
    """Of the seeds from 0 to 5, this one has the largest cost of the shift: experts take 1.5 times
    as long, with other seeds 1.25 times."""
    num_expert_workers: int = 4
    num_redundant: int = 1
    slot_us: float = 800.0
    """Time of an activated expert slot."""
    token_us: float = 800.0
    """Time of a (row, expert) pair."""
    streams: int = 16
    """Requests that run at the same time."""
    prompt_tokens: int = 12
    new_tokens: int = 96
    profile_s: float = 15.0
    """Time in each domain alone, to measure its load for the best placement."""
    before_s: float = 20.0
    """Time in the first domain, under the best placement for it."""
    after_s: float = 100.0
    """Time in the second domain."""
    settled_s: float = 25.0
    """End of the time in the second domain, in which the recovered speed is measured."""
    fresh_s: float = 35.0
    """Time of a new cluster under the best placement for the second domain."""
    window_s: float = 6.0
    """Length of a window of load."""
    bytes_per_s: float = 400_000.0
    """Limit of the weight transfers into a worker; an expert has 246 KB."""


QUICK = Case(
    model=DomainModel(tokens_a_domain=16, layers=2, experts=8, top_k=2),
    slot_us=200.0,
    token_us=50.0,
    streams=4,
    new_tokens=16,
    profile_s=2.0,
    before_s=2.0,
    after_s=6.0,
    settled_s=2.0,
    fresh_s=3.0,
    window_s=0.5,
)
"""Enough to see that everything runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """Speed that clients measured in an interval."""

    tokens_per_s: float
    itl_ms: float
    """Median inter-token latency."""
    slow_itl_ms: float
    """99th percentile of the inter-token latency."""

    @classmethod
    def of(
        cls, tokens: Sequence[Sequence[float | None]], intervals: Sequence[tuple[float, float]]
    ) -> Interval | None:
        """Speed in all intervals together; None if they have too few tokens."""
        mine = [t for t in tokens if any(a <= (t[0] or 0.0) < b for a, b in intervals)]
        gaps = sorted(1e3 * t[1] for t in mine if t[1] is not None)
        seconds = sum(b - a for a, b in intervals)
        if len(gaps) < 2 or seconds <= 0:
            return None
        return cls(
            tokens_per_s=len(mine) / seconds,
            itl_ms=median(gaps),
            slow_itl_ms=gaps[min(int(0.99 * len(gaps)), len(gaps) - 1)],
        )


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Measure the load of both domains, then run both clusters."""
    checkpoint = write(case.model, folder / "model", torch.bfloat16)
    placements = []
    for domain in (0, 1):
        found = _run(case, checkpoint, None, False, [[domain, case.profile_s]])
        path = folder / f"placement-{domain}.json"
        path.write_text(json.dumps(best_placement(case, LoadProfile.from_dict(found["load"]))))
        placements.append(path)
    shifting = [[0, case.before_s], [1, case.after_s]]
    return {
        "shift": _run(case, checkpoint, placements[0], True, shifting),
        "fresh": _run(case, checkpoint, placements[1], False, [[1, case.fresh_s]]),
    }


def best_placement(case: Case, load: LoadProfile) -> dict[str, Any]:
    """The planner's placement for a measured load, without an earlier placement."""
    topology = PlannedTopology.uniform(case.num_expert_workers, case.num_redundant)
    options = PlanOptions(decode_tokens=case.streams)
    return mesh.plan(load, topology, None, options).placement.to_dict()


def _run(
    case: Case,
    checkpoint: Path,
    placement: Path | None,
    follows: bool,
    phases: Sequence[Sequence[float]],
) -> dict[str, Any]:
    """Run one cluster in a new process; without ``placement``, experts are placed in order."""
    job = {
        "checkpoint": str(checkpoint),
        "phases": phases,
        "streams": case.streams,
        "prompt_tokens": case.prompt_tokens,
        "new_tokens": case.new_tokens,
        "tokens_a_domain": case.model.tokens_a_domain,
        "time_taken": {"slot_s": case.slot_us / 1e6, "token_s": case.token_us / 1e6},
        "sections": {
            "workers": {
                "num_expert_workers": case.num_expert_workers,
                "num_redundant_experts": case.num_redundant,
                "recovery_slots": 1,
                "cpus_per_worker": 0.3,
                "placement_file": str(placement) if placement else None,
            },
            "engine": {"max_num_seqs": case.streams, "num_micro_batches": 1},
            "load": {"report_s": case.window_s / 4, "window_s": case.window_s},
            "rebalance": {
                "enable_eplb": follows,
                "interval_s": 2 * case.window_s,
                "bytes_per_s": case.bytes_per_s,
                "slot_cost_pairs": case.slot_us / case.token_us,
            },
        },
    }
    folder = make_temp_dir()
    wait_until_quiet(10.0)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.placement.rebalancing_child"],
            input=json.dumps(job) + "\n",
            stdout=subprocess.PIPE,
            env={**private_environment(folder), FOLDER_VARIABLE: str(folder)},
            text=True,
            timeout=_LIMIT_S,
            check=True,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def intervals_of(case: Case, shift: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Name of a row -> its time intervals."""
    began = shift["marks"][1]
    end = began + case.after_s
    busy: list[tuple[float, float]] = []
    events = [*shift["events"], {"at": end, "phase": "", "moves": False}]
    for event, following in pairwise(events):
        if event["phase"] and following["at"] > began:
            busy.append((max(event["at"], began), following["at"]))
    first = min((a for a, _ in busy), default=end)
    edges = [began, *(at for interval in busy for at in interval), end]
    still = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]
    return {
        "before": [(began / 2, began)],
        "unbalanced": [(began, first)],
        "moving": busy,
        "still": still,
        "settled": [(end - case.settled_s, end)],
    }


def section(quick: bool) -> str:
    """Return the Markdown section."""
    case = QUICK if quick else Case()
    with tempfile.TemporaryDirectory(prefix="em-rebalancing-") as folder:
        found = measure(case, Path(folder))
    if not quick:
        PLOT.write_text(plot(case, found))
    return report(case, found)


def report(case: Case, found: Mapping[str, Any]) -> str:
    """Return the Markdown section for these results."""
    shift, fresh = found["shift"], found["fresh"]
    intervals = intervals_of(case, shift)
    interval = {name: Interval.of(shift["tokens"], own) for name, own in intervals.items()}
    interval["fresh"] = Interval.of(fresh["tokens"], [(case.fresh_s / 3, case.fresh_s)])
    names = {
        "before": "first domain, with its best placement",
        "unbalanced": "second domain, before the first rebalance",
        "moving": "second domain, during rebalances",
        "still": "second domain, between rebalances",
        "settled": f"second domain, the last {case.settled_s:g} s",
        "fresh": "second domain, new cluster with its best placement",
    }
    rows = [[words, *_cells(interval[name])] for name, words in names.items()]
    lines = [
        _words(case),
        table(["load and placement", "tokens/s", "ITL, median, ms", "ITL, p99, ms"], rows),
    ]
    settled, ideal, moving, still = (interval[n] for n in ("settled", "fresh", "moving", "still"))
    if settled and ideal:
        lines.append(
            f"Throughput in the last {case.settled_s:g} s is "
            f"{settled.tokens_per_s / ideal.tokens_per_s:.3f} of the new cluster's (goal: 0.95)."
        )
    if moving and still:
        lines.append(
            f"The p99 of ITL during rebalances is {moving.slow_itl_ms / still.slow_itl_ms:.2f} "
            "times the p99 between them (required: at most 1.25, goal: 1.1). The rebalances, by "
            "epoch:"
        )
    lasts = {e["last"]["epoch"]: e["last"] for e in shift["events"] if e.get("last")}
    lines.append("\n".join(f"- epoch {epoch}: {last['text']}" for epoch, last in lasts.items()))
    return "\n\n".join(lines)


def _cells(interval: Interval | None) -> list[str]:
    if interval is None:
        return ["-"] * 3
    return [f"{interval.tokens_per_s:.0f}", f"{interval.itl_ms:.1f}", f"{interval.slow_itl_ms:.1f}"]


def _words(case: Case) -> str:
    model = case.model
    return (
        f"## Rebalancing after a domain shift\n\n1 attention worker and {case.num_expert_workers} "
        f"expert workers serve {case.streams} requests at a time with {case.prompt_tokens} prompt "
        f"and {case.new_tokens} new tokens each. The model has {model.layers} layers of "
        f"{model.experts} experts, top-{model.top_k}; each worker has {case.num_redundant} spare "
        f"slot in a layer. Instead of computing, expert workers wait {case.slot_us:g} us for each "
        f"activated slot and {case.token_us:g} us for each row of an expert, so that an uneven "
        "load costs time. At one moment all requests change to another domain, whose tokens choose "
        "other experts. The best placement for a domain is planned from the load of this domain "
        "alone. "
        f"The cluster rebalances automatically, with load windows of {case.window_s:g} s, at most "
        f"a tenth of the slots in a rebalance, and {case.bytes_per_s / 1e3:g} KB/s into each "
        "worker. ITL is the inter-token latency of a stream."
    )


def plot(case: Case, found: Mapping[str, Any]) -> str:
    """Plot throughput over time as SVG, with the rebalances and the new cluster's throughput."""
    shift = found["shift"]
    end = shift["marks"][1] + case.after_s
    counts = [0] * (int(end / _BIN_S) + 1)
    for at, _ in shift["tokens"]:
        if at < end:
            counts[int(at / _BIN_S)] += 1
    rates = tuple(((i + 0.5) * _BIN_S, c / _BIN_S) for i, c in enumerate(counts[:-1]))
    lines = [Line("the cluster that rebalances", rates)]
    if ideal := Interval.of(found["fresh"]["tokens"], [(case.fresh_s / 3, case.fresh_s)]):
        level = ((0.0, ideal.tokens_per_s), (end, ideal.tokens_per_s))
        lines.append(Line("a new one, best placement", level))
    return line_chart(
        lines,
        "seconds",
        "tokens/s; shaded: a change of the placement is under way",
        bands=intervals_of(case, shift)["moving"],
        marks=[Mark("the load shifts", shift["marks"][1])],
    )


if __name__ == "__main__":
    sys.stdout.write(section(quick="--quick" in sys.argv[1:]) + "\n")
