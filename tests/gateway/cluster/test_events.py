"""Changes of the cluster that a gateway sees in the controller's snapshots."""

from __future__ import annotations

from typing import Any

from gateway.cluster.events import ClusterEvents


def change(number: int, seconds: float | None = None) -> dict[str, Any]:
    return {"name": "expertmesh.recovery", "span_id": f"{number:048x}", "seconds": seconds}


def during(events: ClusterEvents, began_s: float, ended_s: float) -> list[int]:
    """Numbers of the changes that went on in this time."""
    return [int.from_bytes(each.span_id, "big") for each in events.changes(began_s, ended_s)]


def test_a_change_goes_on_from_its_first_snapshot_to_the_one_with_its_length() -> None:
    events = ClusterEvents()
    events.take({"changes": [change(1)]}, 10.0)
    assert during(events, 0.0, 9.0) == []
    assert during(events, 11.0, 50.0) == [1], "it has not ended"
    events.take({"changes": [change(1, 3.0)]}, 12.0)
    events.take({"changes": [change(1, 3.0)]}, 20.0)
    assert during(events, 9.5, 9.6) == [1], "it had begun before it was seen"
    assert during(events, 12.5, 50.0) == []


def test_a_change_that_was_seen_at_its_end_only_has_its_length() -> None:
    events = ClusterEvents()
    events.take({"changes": [change(1, 3.0)]}, 12.0)
    assert during(events, 8.0, 8.9) == []
    assert during(events, 8.0, 9.0) == [1]


def test_changes_are_remembered_although_the_controller_names_them_no_more() -> None:
    events = ClusterEvents()
    events.take({"changes": [change(1), change(2, 1.0)]}, 10.0)
    events.take({"changes": []}, 12.0)
    assert during(events, 9.0, 11.0) == [1, 2]
    assert during(events, 13.0, 14.0) == [], "the controller of the first is gone"
