"""The parts of the benchmark of a second model that need no cluster."""

from __future__ import annotations

from benchmarks.faults.rolls import Answer, Clients
from benchmarks.faults.second_model import Periods, report, token_times


def clients_with(*answers: Answer) -> Clients:
    return Clients("", {}, list(answers))


def test_requests_within_a_period_count() -> None:
    inside, across = Answer([1, 2], [1.0, 1.5, 2.0]), Answer([1, 2], [2.0, 3.0, 5.0])
    clients = clients_with(inside, across)
    assert token_times(clients, [(1.0, 4.0)]) == [0.5]
    assert token_times(clients, [(0.0, 1.0), (2.0, 6.0)]) == [2.0]


def test_the_ratio_is_that_of_the_medians() -> None:
    alone = [Answer([1, 2], [t, t + 0.5, t + 0.6]) for t in range(10)]
    loading = [Answer([1, 2], [t, t + 0.5, t + 0.75]) for t in range(20, 30)]
    periods = Periods(loads=[(20.0, 31.0)], pauses=[(0.0, 11.0)])
    text = report(clients_with(*alone, *loading), periods)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[2] == ["alone", "10", "100.0", "100.0"]
    assert rows[3] == ["while the second loads", "10", "250.0", "250.0"]
    assert "Ratio of the medians 2.50; a load took 11.0 s." in text
