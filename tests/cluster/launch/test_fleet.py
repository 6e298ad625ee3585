"""What a launcher says about the workers of one model, and when the model is lost."""

from __future__ import annotations

import pytest

from cluster.launch.fleet import describe_threads


@pytest.mark.parametrize(
    ("threads", "words"),
    [
        ([2], "1 worker with 2 compute threads"),
        ([1, 1, 1], "3 workers with 1 compute thread each"),
        ([1, 4, 1], "1 worker with 4 compute threads, 2 workers with 1 compute thread each"),
        ([None, 4], "1 worker with 4 compute threads"),
        ([None], ""),
    ],
)
def test_compute_threads_are_told_by_number(threads: list[int | None], words: str) -> None:
    assert (
        describe_threads([{"threads": number, "state": "SERVING"} for number in threads]) == words
    )


def test_workers_that_are_gone_are_not_counted() -> None:
    states = ("SERVING", "LOST", "DRAINED")
    words = describe_threads([{"threads": 1, "state": state} for state in states])
    assert words == "1 worker with 1 compute thread"
