"""The benchmark of the KV index runs, small."""

from __future__ import annotations

from benchmarks.engine import kv_index


def test_all_costs_are_measured() -> None:
    found = {cost.what: cost.us for cost in kv_index.measure(64 * 64 * 4)}
    assert {"event", "lookup", "end of worker", "route, 64 blocks"} < found.keys()
    assert found["longest event"] >= found["event"] > 0
