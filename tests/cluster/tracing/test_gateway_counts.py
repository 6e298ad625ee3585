"""What gateways have counted outlives each of the processes that keep it."""

from __future__ import annotations

from cluster.tracing.gateway_counts import MAX_GATEWAYS, RETENTION_S, GatewayCounts, GatewayRecord


def record(*times: float, tokens: float = 1.0) -> GatewayRecord:
    samples = [{"time": time_s} for time_s in times]
    return GatewayRecord(time=times[-1], created=900.0, totals={"tokens": tokens}, samples=samples)


def seen(counts: GatewayCounts) -> dict[str, list[float]]:
    found = counts.ended(()).items()
    return {name: [sample["time"] for sample in one["samples"]] for name, one in found}


def test_only_what_is_new_is_told() -> None:
    counts = GatewayCounts()
    counts.merge({"a": record(1000.0, 1002.0), "b": record(1000.0)})
    assert seen(counts) == {"a": [1000.0, 1002.0], "b": [1000.0]}
    told = counts.newer_than({"a": 1000.0, "b": 1000.0})
    assert told.keys() == {"a"}
    assert told["a"]["samples"] == [{"time": 1002.0}]


def test_a_sample_is_kept_once_and_older_totals_are_ignored() -> None:
    counts = GatewayCounts()
    counts.merge({"a": record(1000.0, 1002.0, tokens=7.0)})
    counts.merge({"a": record(1000.0, tokens=3.0)})
    counts.merge({"a": record(1002.0, tokens=3.0)})
    assert seen(counts) == {"a": [1000.0, 1002.0]}
    assert counts.ended(())["a"]["totals"] == {"tokens": 7.0}


def test_what_is_old_is_forgotten_and_totals_are_not() -> None:
    counts = GatewayCounts()
    counts.merge({"a": record(1000.0, 1002.0)})
    counts.merge({"b": record(1000.0 + RETENTION_S)})
    assert seen(counts) == {"a": [1002.0], "b": [1000.0 + RETENTION_S]}
    counts.merge({"b": record(9000.0)})
    assert seen(counts) == {"a": [], "b": [9000.0]}
    assert counts.ended({"b"})["a"]["totals"] == {"tokens": 1.0}


def test_gateways_without_end_are_not_kept() -> None:
    counts = GatewayCounts()
    for number in range(MAX_GATEWAYS + 9):
        counts.merge({f"gateway-{number}": record(1000.0 + number)})
    names = counts.times().keys()
    assert len(names) == MAX_GATEWAYS
    assert "gateway-8" not in names
    assert "gateway-9" in names


def test_a_controller_and_a_gateway_that_start_anew_get_everything_back() -> None:
    old, controller = GatewayCounts(), GatewayCounts()
    old.merge({"a": record(1000.0, 1002.0)})
    there = controller.exchange(old.newer_than({}), old.times())
    assert there == {"records": {}, "times": {"a": 1002.0}}
    new = GatewayCounts()
    new.merge(controller.exchange({}, {})["records"])
    assert seen(new) == {"a": [1000.0, 1002.0]}
    new.merge({"b": record(1004.0)})
    after_restart = GatewayCounts()
    times = after_restart.exchange(new.newer_than(there["times"]), new.times())["times"]
    assert times == {"b": 1004.0}, "so the gateway sees what the controller lacks"
    after_restart.exchange(new.newer_than(times), new.times())
    assert seen(after_restart) == {"a": [1000.0, 1002.0], "b": [1004.0]}
