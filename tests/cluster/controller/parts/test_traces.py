"""Names of the traces of changes: which ones gateways are told of."""

from __future__ import annotations

from cluster.controller.parts.traces import ChangeTraces


def test_a_change_that_goes_on_is_told_however_many_end_meanwhile() -> None:
    traces = ChangeTraces("a", is_on=True)
    opened = traces.begin("expertmesh.recovery")
    for _ in range(40):
        traces.end(traces.begin("expertmesh.migration"), 1.0, {})
    recovery, *others = traces.to_list()
    assert recovery == {"name": "expertmesh.recovery", "place": opened.place.hex(), "seconds": None}
    assert len(others) == 15
    assert traces.end(opened, 2.0, {"a": 1}, "failed").place == opened.place
    assert traces.to_list()[0]["seconds"] == 2.0


def test_no_two_traces_have_the_same_ids() -> None:
    places = [ChangeTraces(name, is_on=True).begin("x").place for name in ("a", "b")]
    traces = ChangeTraces("a", is_on=True)
    places += [traces.begin("x").place, traces.begin("x").place]
    assert len(set(places)) == 3, "only the first of one controller twice"
    assert {len(place) for place in places} == {24}
