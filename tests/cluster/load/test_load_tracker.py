"""Totals, windows and averages of the cluster's expert load, by a clock moved by hand."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config.expert_load import LoadSection
from cluster.core.errors import ConfigError
from cluster.core.load_profile import BankLoad
from cluster.load.tracker import LoadTracker
from tests.cluster.controller.load_reports import make_report

KEY = ("mlp", 0)


def make_tracker(window_s: float = 10.0, half_life_s: float = 10.0) -> LoadTracker:
    return LoadTracker(LoadSection(window_s=window_s, half_life_s=half_life_s, num_windows=2), 0.0)


def test_totals_are_the_sum_of_the_workers_newest_reports() -> None:
    load = make_tracker()
    load.take("attention-0", make_report(1, [1, 0]))
    load.take("attention-0", make_report(5, [4, 1]))
    load.take("attention-1", make_report(2, [0, 2], [[1], [0]]))
    load.take("attention-0", make_report(3, [2, 1]))  # overtaken by the newer one
    assert load.totals().rows == 7
    assert load.totals().counts(KEY).tolist() == [5, 3]
    assert load.totals().prefill[KEY].tolist() == [1, 0]
    assert load.totals().decode[KEY].tolist() == [4, 3]


def test_a_report_with_the_rows_of_the_last_one_may_be_newer() -> None:
    load = make_tracker()
    assert load.epoch == 0
    load.take("a", make_report(5, [4, 1], epoch=1))
    load.take("a", make_report(5, [4, 1], epoch=2))
    assert load.epoch == 2


def test_a_window_is_what_came_in_its_time() -> None:
    load = make_tracker()
    load.take("a", make_report(4, [3, 1]))
    assert load.tick(9.9) is None
    first = load.tick(10.0)
    assert first is not None
    assert first.began_at == 0.0
    assert first.sums.counts(KEY).tolist() == [3, 1]
    load.take("a", make_report(9, [4, 5]))
    load.take("b", make_report(1, [0, 1]))  # a worker that came later
    assert load.tick(19.9) is None
    second = load.tick(20.0)
    assert second is not None
    assert second.sums.rows == 6
    assert second.sums.counts(KEY).tolist() == [1, 5]
    assert load.sums("window") is second.sums
    assert load.num_windows == 2


def test_load_from_before_a_restart_of_the_controller_is_in_no_window() -> None:
    load = make_tracker()
    load.resume(["a", "idle"])
    load.take("a", make_report(1000, [999, 1]))
    assert load.tick(10.0) is None, "nothing came in its time"
    load.take("a", make_report(1002, [1000, 2]))
    load.take("idle", make_report(500, [500, 0]))  # it says nothing while it is idle
    load.take("new", make_report(3, [3, 0]))
    window = load.tick(20.0)
    assert window is not None
    assert window.sums.counts(KEY).tolist() == [4, 1]
    assert load.sums("average").rows == 5
    assert load.totals().rows == 1505


def test_of_workers_that_have_left_only_a_sum_is_kept() -> None:
    load = make_tracker()
    for number in range(1, 4):
        load.take(f"attention-0.{number}", make_report(2, [2, 1], epoch=number))
        load.forget([])
        assert load.totals().rows == 2 * number
        assert load.totals().counts(KEY).tolist() == [2 * number, number]
        assert load.copies(number)[KEY].decode.tolist() == [2, 1], "it may just be lost"
    assert list(load._reports) == ["attention-0.3"]
    load.take("attention-0.4", make_report(1, [0, 1], epoch=4))
    load.forget(["attention-0.3", "attention-0.4"])
    assert list(load._reports) == ["attention-0.3", "attention-0.4"]


def test_only_the_newest_windows_are_kept() -> None:
    load = make_tracker()
    for i in range(1, 5):
        load.take("a", make_report(i, [i, 0]))
        load.tick(10.0 * i)
    assert [w.began_at for w in load.windows] == [20.0, 30.0]
    assert load.num_windows == 4


def test_an_average_halves_with_the_half_life() -> None:
    load = make_tracker(window_s=10.0, half_life_s=20.0)
    load.take("a", make_report(8, [8, 0]))
    load.tick(10.0)
    load.take("a", make_report(12, [8, 4]))
    load.tick(20.0)
    assert load.sums("average").counts(KEY) == pytest.approx([8 * 0.5**0.5, 4])
    assert load.sums("average").rows == pytest.approx(8 * 0.5**0.5 + 4)


def test_time_without_load_is_no_window_and_forgets_nothing() -> None:
    load = make_tracker()
    load.take("a", make_report(8, [6, 2]))
    load.tick(10.0)
    before = load.sums("average").counts(KEY).tolist()
    for now in (20.0, 30.0, 1000.0):
        assert load.tick(now) is None
    assert load.sums("average").counts(KEY).tolist() == before
    assert len(load.windows) == 1


def test_copies_are_those_of_the_newest_epoch() -> None:
    load = make_tracker()
    load.take("a", make_report(4, [1, 0], [[2, 1], [0, 0]], epoch=1))
    load.take("b", make_report(2, [0, 5], [[0], [1]], epoch=1))
    (copies,) = load.copies(load.epoch).values()
    assert copies.prefill.tolist() == [[2, 1], [1, 0]]
    assert copies.decode.tolist() == [1, 5]
    load.tick(10.0)
    load.take("a", make_report(9, [3, 0], [[4, 1], [0, 0]], epoch=1))
    window = load.tick(20.0)
    assert window is not None
    assert window.copies[KEY].prefill.tolist() == [[2, 0], [0, 0]]
    assert window.copies[KEY].decode.tolist() == [2, 0]
    load.take("a", make_report(11, [9, 9], [[0], [3]], epoch=2))
    assert load.epoch == 2
    assert load.copies(load.epoch)[KEY].prefill.tolist() == [[0], [3]]
    window = load.tick(30.0)
    assert window is not None
    assert window.copies[KEY].prefill.tolist() == [[0], [3]]


def test_each_view_is_a_profile() -> None:
    load = make_tracker()
    assert all(load.profile(source, "demo", 2) is None for source in ("total", "window", "average"))
    load.take("a", make_report(4, [6, 2]))
    total = load.profile("total", "demo", 2)
    assert total is not None
    assert (total.model, total.top_k, total.tokens) == ("demo", 2, 4)
    assert total.banks == (BankLoad(bank="mlp", layer=0, counts=(6, 2)),)
    assert load.profile("window", "demo", 2) is None
    load.tick(10.0)
    load.take("a", make_report(5, [6, 4]))
    load.tick(20.0)
    window, average = (load.profile(s, "demo", 2) for s in ("window", "average"))
    assert window is not None
    assert average is not None
    assert window.counts(*KEY) == (0, 2)
    assert average.counts(*KEY) == (3, 3)


def test_watched_experts_change_only_with_the_epoch() -> None:
    load = make_tracker()
    load.take("a", make_report(9, [*range(10), 0]))
    assert KEY not in load.watched
    load.tick(10.0)
    assert load.watched[KEY] == (2, 3, 4, 5, 6, 7, 8, 9)
    load.take("a", make_report(99, [99, *range(1, 10), 0]))
    load.tick(20.0)
    assert load.watched[KEY] == (2, 3, 4, 5, 6, 7, 8, 9)
    load.take("a", make_report(100, [99, *range(1, 10), 1], epoch=2))
    load.tick(30.0)
    assert load.watched[KEY] == (0, 3, 4, 5, 6, 7, 8, 9)


def test_counters_of_watched_experts_and_of_the_rest_never_fall() -> None:
    load = make_tracker()

    def counters(*reported: Any, epoch: int = 1) -> tuple[dict[int, int], int]:
        load.take("a", make_report(*reported, epoch=epoch))
        counts = load.totals().counts(KEY)
        tokens, rest = load.watched_tokens(KEY, counts)
        assert len(tokens) == len(load.watched.get(KEY, ()))
        return dict(zip(load.watched.get(KEY, ()), tokens, strict=True)), rest

    assert counters(9, [*range(10), 0]) == ({}, 45)
    load.tick(10.0)
    assert counters(10, [*range(10), 0]) == (dict.fromkeys(range(2, 10), 0), 45)
    tokens, rest = counters(99, [99, 1, 5, *range(3, 10), 0], epoch=2)
    assert (tokens[2], tokens[3], rest) == (3, 0, 45 + 99)
    load.tick(20.0)
    assert load.watched[KEY] == (0, 2, 4, 5, 6, 7, 8, 9)  # 0 in place of 3
    tokens, rest_then = counters(100, [100, 1, 5, *range(3, 10), 0], epoch=2)
    assert tokens[0] == 1
    assert rest_then == rest
    assert sum(tokens.values()) + rest_then == 100 + 1 + 5 + sum(range(3, 10))


@pytest.mark.parametrize("name", ["report_s", "window_s", "half_life_s", "num_windows"])
def test_limits_of_the_settings(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        LoadSection(**{name: 0})
