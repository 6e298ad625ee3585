"""What a launcher waits for in a Ray that it joins."""

from __future__ import annotations

import pytest

from cluster.launch.joining import wait_free_cpus


def test_cpus_of_ended_actors_are_awaited(caplog: pytest.LogCaptureFixture) -> None:
    counts = iter([1.0, 1.0, 2.5, 4.0])
    wait_free_cpus(4.0, 60.0, lambda: next(counts))
    assert list(counts) == []
    assert caplog.records == []


def test_cpus_that_others_took_are_given_up(caplog: pytest.LogCaptureFixture) -> None:
    wait_free_cpus(4.0, 0.0, lambda: 3.0)
    assert "Ray has 3 of 4 CPUs free after 0 s" in caplog.text
