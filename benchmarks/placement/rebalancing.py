"""What rebalancing brings when the load shifts to another domain, and what it costs meanwhile.

Paced expert workers: a step takes a given time for each activated slot and each token, waited and
not computed, since on shared cores an uneven load costs nothing by itself.
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
    """What is measured."""

    model: DomainModel = field(
        default_factory=lambda: DomainModel(
            tokens_a_domain=64, layers=4, experts=32, top_k=4, ffn=256, skew=2.0, seed=2
        )
    )
    """Of the seeds from 0 to 5 the one with which the shift costs most: half of the experts' time
    again, where others cost a quarter."""
    num_expert_workers: int = 4
    num_redundant: int = 1
    slot_us: float = 800.0
    """Time of an activated expert slot."""
    token_us: float = 800.0
    """Time of a (row, expert) pair."""
    streams: int = 16
    """Requests at a time."""
    prompt_tokens: int = 12
    new_tokens: int = 96
    profile_s: float = 15.0
    """In each domain alone, to learn its load for the best placement."""
    before_s: float = 20.0
    """In the first domain, under the best placement for it."""
    after_s: float = 100.0
    """In the second domain."""
    settled_s: float = 25.0
    """At the end of it: what it has recovered to."""
    fresh_s: float = 35.0
    """A new cluster under the best placement for the second domain."""
    window_s: float = 6.0
    """Window of load."""
    bytes_per_s: float = 400_000.0
    """Rate of the moves into a worker: an expert is 246 KB."""


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
    """What clients saw in an interval."""

    tokens_per_s: float
    itl_ms: float
    """Median."""
    slow_itl_ms: float
    """99 of 100 are below."""

    @classmethod
    def of(
        cls, tokens: Sequence[Sequence[float | None]], intervals: Sequence[tuple[float, float]]
    ) -> Interval | None:
        """Numbers of all intervals together; None where there are too few tokens."""
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
    """The load of both domains, then both clusters, one after the other."""
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
    """The planner's placement, made from nothing, for a load that was measured."""
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
    """One cluster in a process of its own; without ``placement`` experts stand in their order."""
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
    """Intervals by what went on in them."""
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
    """The section of its page."""
    case = QUICK if quick else Case()
    with tempfile.TemporaryDirectory(prefix="em-rebalancing-") as folder:
        found = measure(case, Path(folder))
    if not quick:
        PLOT.write_text(plot(case, found))
    return report(case, found)


def report(case: Case, found: Mapping[str, Any]) -> str:
    """The table and what it comes to."""
    shift, fresh = found["shift"], found["fresh"]
    intervals = intervals_of(case, shift)
    interval = {name: Interval.of(shift["tokens"], own) for name, own in intervals.items()}
    interval["fresh"] = Interval.of(fresh["tokens"], [(case.fresh_s / 3, case.fresh_s)])
    names = {
        "before": "first domain, the best placement for it",
        "unbalanced": "second domain, before the first change",
        "moving": "second domain, while a change is under way",
        "still": "second domain, while none is",
        "settled": f"second domain, the last {case.settled_s:g} s",
        "fresh": "second domain, a new cluster with the best placement for it",
    }
    rows = [[words, *_cells(interval[name])] for name, words in names.items()]
    lines = [_words(case), table(["", "tokens/s", "ITL ms", "p99 ITL ms"], rows)]
    settled, ideal, moving, still = (interval[n] for n in ("settled", "fresh", "moving", "still"))
    if settled and ideal:
        lines.append(
            f"Recovered to {settled.tokens_per_s / ideal.tokens_per_s:.3f} of the new cluster's "
            "throughput (aim: 0.95)."
        )
    if moving and still:
        lines.append(
            f"p99 ITL while changes are under way is {moving.slow_itl_ms / still.slow_itl_ms:.2f} "
            "of the p99 while none is (limit 1.25, aim 1.1)."
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
        f"## Rebalancing after a domain shift\n\n1 attention + {case.num_expert_workers} expert "
        f"workers in paced mode ({case.slot_us:g} us an activated slot, {case.token_us:g} us a "
        f"token), {model.layers} layers of {model.experts} experts, top-{model.top_k}, "
        f"{case.num_redundant} spare slot each. {case.streams} requests at a time, "
        f"{case.prompt_tokens} prompt and {case.new_tokens} new tokens each. All requests change "
        "from one domain to another, whose tokens choose other experts; the best placement for a "
        "domain is planned from the load measured while only it was served. The cluster "
        f"rebalances by itself with windows of {case.window_s:g} s, at most a tenth of the slots "
        f"in one change and {case.bytes_per_s / 1e3:g} KB/s into each worker."
    )


def plot(case: Case, found: Mapping[str, Any]) -> str:
    """Throughput over time as SVG, with the changes and the new cluster's level."""
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
