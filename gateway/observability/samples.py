"""Samples of the last ten minutes of a gateway, for the charts of the dashboard. Pure.

A sample has the counts since the previous sample, so that the counts of replicas can be summed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from cluster.core.metric_families import PlainFamily
from cluster.tracing.gateway_counts import RETENTION_S
from gateway.core.replay import ReplayCause

PERIOD_S = 2.0
"""Interval of samples in seconds."""
MAX_SAMPLES = round(RETENTION_S / PERIOD_S)
"""Maximum number of samples that are kept."""
MAX_WORKERS = 32
"""Maximum number of attention workers in a sample; a chart with more lines is not readable."""

TOTALS = ("prompt_tokens_total", "generation_tokens_total", "request_success_total")
"""Counters that each gateway reports as totals since its own start."""
_COUNTERS = {"prompt": "prompt_tokens_total", "output": "generation_tokens_total"}
_HISTOGRAMS = {"ttft": "time_to_first_token_seconds", "itl": "inter_token_latency_seconds"}
_REPLAYS = "requests_replayed_total"
SAMPLED = (*_COUNTERS.values(), *(f"{name}_bucket" for name in _HISTOGRAMS.values()), _REPLAYS)
"""Names of the metrics from which a sample is made."""

Sample = dict[str, Any]
"""``time`` is a Unix time in seconds, a multiple of ``PERIOD_S``; ``seconds`` is the time since the
previous sample. Counts in this time: ``prompt`` and ``output`` tokens, requests ``moved`` with
their KV blocks or computed ``again``, ``ttft`` and ``itl`` as ``[low, high, count]`` of each bucket
with values, in seconds (high None: no bound). By attention worker: ``waiting`` requests and the
fraction of ``kv`` blocks in use. ``balancedness`` is that of all experts."""


class SampleRing:
    """The newest samples of one replica, at most ``MAX_SAMPLES``."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)
        self._time_s = -math.inf
        self._counts: dict[str, Any] = {}

    def add(
        self,
        time_s: float,
        families: Iterable[PlainFamily],
        snapshot: Mapping[str, Any] | None,
        load: Mapping[str, Any] | None,
    ) -> None:
        """Add a sample for the current Unix time ``time_s``. The first call only starts counting.

        A second call in the same period adds nothing. If the clock was set back, samples with
        later times are removed.
        """
        begins_s = time_s // PERIOD_S * PERIOD_S
        while self._samples and self._samples[-1]["time"] > begins_s:
            self._samples.pop()
        if self._samples and self._samples[-1]["time"] == begins_s:
            return
        counts = _counts(list(families))
        before, since_s = self._counts, self._time_s
        self._counts, self._time_s = counts, time_s
        if not before or time_s <= since_s:
            return
        changed = {
            name: _bucket_counts(value, before[name])
            if name in _HISTOGRAMS
            else value - before[name]
            for name, value in counts.items()
        }
        both = (load or {}).get("balancedness") or {}
        self._samples.append(
            {
                "time": begins_s,
                "seconds": round(time_s - since_s, 3),
                **changed,
                **_by_worker(snapshot or {}),
                "balancedness": {name: both.get(name) for name in ("achieved", "predicted")},
            }
        )

    def after(self, time_s: float) -> list[Sample]:
        """Return the samples that begin after ``time_s``, oldest first."""
        return [sample for sample in self._samples if sample["time"] > time_s]


def merge_samples(
    replicas: Iterable[list[Sample]], ended: Iterable[list[Sample]] = ()
) -> list[Sample]:
    """Merge samples into one per period, with the counts of all replicas, including ended ones.

    Periods that a replica (if it has any samples) has not reached yet are omitted.
    """
    rings = [samples for samples in replicas if samples]
    ends_s = min((samples[-1]["time"] for samples in rings), default=math.inf)
    rings.extend(ended)
    merged: dict[float, Sample] = {}
    for sample in (one for samples in rings for one in samples if one["time"] <= ends_s):
        known = merged.get(sample["time"])
        merged[sample["time"]] = sample if known is None else _sum_of(known, sample)
    return [merged[time_s] for time_s in sorted(merged)]


def total(families: Iterable[PlainFamily], name: str) -> float:
    """Return the sum of a counter's series."""
    return sum(value for _, value in _series(families, name))


def _counts(families: list[PlainFamily]) -> dict[str, Any]:
    causes = {cause.value: 0.0 for cause in ReplayCause}
    for labels, value in _series(families, _REPLAYS):
        causes[labels["cause"]] += value
    moved = causes.pop(ReplayCause.MOVED.value)
    return {
        **{key: total(families, name) for key, name in _COUNTERS.items()},
        "moved": moved,
        "again": sum(causes.values()),
        **{key: _buckets(families, name) for key, name in _HISTOGRAMS.items()},
    }


def _buckets(families: Iterable[PlainFamily], name: str) -> dict[float, float]:
    """Return the cumulative count by upper bound, summed over all series."""
    counts: dict[float, float] = {}
    for labels, value in _series(families, f"{name}_bucket"):
        bound = float(labels["le"])
        counts[bound] = counts.get(bound, 0.0) + value
    return dict(sorted(counts.items()))


def _bucket_counts(
    now: Mapping[float, float], before: Mapping[float, float]
) -> list[list[float | None]]:
    """Return ``[low, high, count]`` of each bucket with new values."""
    rows: list[list[float | None]] = []
    low, below = 0.0, 0.0
    for high, cumulative in now.items():
        count = cumulative - before.get(high, 0.0)
        if count > below:
            rows.append([low, None if math.isinf(high) else high, count - below])
        low, below = high, count
    return rows


def _by_worker(snapshot: Mapping[str, Any]) -> Sample:
    workers = [
        worker
        for worker in snapshot.get("workers") or ()
        if worker.get("kv_blocks_total") and worker["state"] not in ("LOST", "DRAINED")
    ][:MAX_WORKERS]
    waiting = {w["name"]: (w.get("stats") or {}).get("num_requests_waiting", 0) for w in workers}
    return {"waiting": waiting, "kv": {w["name"]: round(w["kv_usage"] or 0.0, 4) for w in workers}}


def _sum_of(one: Sample, other: Sample) -> Sample:
    """Add the counts of two samples. Values of the cluster are from ``one``."""
    found = {**one, "seconds": max(one["seconds"], other["seconds"])}
    for name in _HISTOGRAMS:
        rows: dict[tuple[float, float | None], float] = {(a, b): count for a, b, count in one[name]}
        for low, high, count in other[name]:
            rows[low, high] = rows.get((low, high), 0.0) + count
        found[name] = [
            [low, high, rows[low, high]] for low, high in sorted(rows, key=lambda row: row[0])
        ]
    for name in (*_COUNTERS, "moved", "again"):
        found[name] = one[name] + other[name]
    return found


def _series(
    families: Iterable[PlainFamily], name: str
) -> Iterable[tuple[Mapping[str, str], float]]:
    for family in families:
        for sample, labels, value in family["samples"]:
            if sample == name:
                yield labels, value
