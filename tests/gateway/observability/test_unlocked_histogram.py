"""The unlocked histogram shows what prometheus_client's own shows for the same values."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram

from cluster.core.metric_families import new_registry, to_plain
from gateway.observability.unlocked_histogram import UnlockedHistogram

BUCKETS = (0.001, 0.25, 2.5)
VALUES = (0.0, 0.001, 0.0011, 0.25, 2.0, 2.5, 7.0)


def observed(
    kind: type[Histogram] | type[UnlockedHistogram], registry: CollectorRegistry
) -> CollectorRegistry:
    """A registry with one labelled and one plain family of a kind, after all values."""
    labelled = kind(
        "by_engine_seconds", "By engine", ("engine",), registry=registry, buckets=BUCKETS
    )
    plain = kind("lag_seconds", "Lag", registry=registry, buckets=BUCKETS)
    series = plain if isinstance(plain, Histogram) else plain.labels()
    for value in VALUES:
        labelled.labels("0").observe(value)
        series.observe(value)
    labelled.labels("1")
    return registry


def test_families_equal_those_of_prometheus_client() -> None:
    expected = to_plain(observed(Histogram, new_registry()))
    assert to_plain(observed(UnlockedHistogram, new_registry())) == expected


def test_a_registry_finds_its_samples_by_name() -> None:
    registry = observed(UnlockedHistogram, new_registry())
    (family,) = to_plain(registry.restricted_registry(["lag_seconds_count"]))
    assert family["samples"] == [["lag_seconds_count", {}, float(len(VALUES))]]
