"""The history of the cluster."""

from __future__ import annotations

from cluster.controller.controller_memory import History


def test_an_event_has_the_longest_pause_that_gateways_report() -> None:
    history = History(0.0)
    history.add(2, 10.0, "lost expert-1: reset", "expert-0 serves alone")
    history.paused(2, 9.0)  # it does not run yet
    history.runs(2, 40, 10.075)
    history.add(2, 11.0, "rebalance", "nothing")
    assert [entry["took_s"] for entry in history.to_list()] == [0.075, None]
    for pause_s in (1.3, 0.4, 1.4):
        history.paused(2, pause_s)
    history.paused(3, 5.0)
    assert [entry["took_s"] for entry in history.to_list()] == [1.4, None]
    again = History(0.0)
    again.restore(history.newest())
    again.paused(2, 1.0)
    assert again.to_list() == history.to_list()


def test_streams_that_hardly_paused_shorten_it() -> None:
    history = History(0.0)
    history.add(2, 10.0, "expert-1.2 joins", "all places are filled")
    history.runs(2, 40, 10.5)
    history.paused(2, 0.03)
    assert history.to_list()[0]["took_s"] == 0.03
