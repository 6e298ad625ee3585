"""Names of the traces of changes: which ones gateways are told of."""

from __future__ import annotations

from cluster.controller.traces import ChangeTraces


def test_a_change_that_goes_on_is_told_however_many_end_meanwhile() -> None:
    traces = ChangeTraces("a", is_on=True)
    opened = traces.begin("expertmesh.recovery")
    for _ in range(40):
        traces.end(traces.begin("expertmesh.migration"), 1.0, {})
    recovery, *others = traces.to_list()
    assert recovery == {
        "name": "expertmesh.recovery",
        "span_id": opened.span_id.hex(),
        "seconds": None,
    }
    assert len(others) == 15
    assert traces.end(opened, 2.0, {"a": 1}, "failed").span_id == opened.span_id
    assert traces.to_list()[0]["seconds"] == 2.0


def test_no_two_traces_have_the_same_ids() -> None:
    ids = [ChangeTraces(name, is_on=True).begin("x").span_id for name in ("a", "b")]
    traces = ChangeTraces("a", is_on=True)
    ids += [traces.begin("x").span_id, traces.begin("x").span_id]
    assert len(set(ids)) == 3, "only the first of one controller twice"
    assert {len(span_id) for span_id in ids} == {24}
