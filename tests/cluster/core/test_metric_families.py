"""The text format, against that of ``prometheus_client``."""

from __future__ import annotations

import math

from prometheus_client import Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cluster.core.metric_families import MergedFamilies, new_registry, to_plain

ODD = 'a "quoted" \\ back\nline'


def test_the_text_is_that_of_the_client_library() -> None:
    registry = new_registry()
    counts = Counter("calls", f"Calls {ODD}", ["route", "code"], registry=registry)
    counts.labels("/x", "200").inc(3)
    counts.labels(ODD, "200").inc(1e20)
    gauge = Gauge("level", "A level", registry=registry)
    gauge.set(-0.5)
    for value in (math.inf, -math.inf, math.nan):
        Gauge(f"odd_{value}".replace("-", "minus_"), "Odd", registry=registry).set(value)
    times = Histogram("time_seconds", "A time", ["phase"], registry=registry, buckets=(0.1, 1))
    times.labels("decode").observe(0.25)
    merged = MergedFamilies("")
    merged.add(to_plain(registry))
    assert merged.render() == generate_latest(registry)


def test_families_of_several_processes_are_merged() -> None:
    merged = MergedFamilies("p:")
    for name in ("a", "b"):
        registry = new_registry()
        Counter("calls", "Calls", ["code"], registry=registry).labels("200").inc()
        merged.add(to_plain(registry), gateway=name)
    (family,) = text_string_to_metric_families(merged.render().decode())
    assert family.name == "p:calls"
    assert [s.labels for s in family.samples] == [
        {"code": "200", "gateway": "a"},
        {"code": "200", "gateway": "b"},
    ]


def test_a_label_of_the_process_replaces_one_of_its_sample() -> None:
    """Prometheus refuses a whole scrape in which a sample has a label twice."""
    registry = new_registry()
    Gauge("level", "A level", ["gateway"], registry=registry).labels("other").set(1)
    merged = MergedFamilies("p:")
    merged.add(to_plain(registry), gateway="a")
    assert merged.render().splitlines()[-1] == b'p:level{gateway="a"} 1.0'


def test_nothing_is_an_empty_text() -> None:
    assert MergedFamilies("p:").render() == b""
