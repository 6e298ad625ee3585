"""A disk of the log that hangs, or is slow, holds no thread that writes lines."""

from __future__ import annotations

import asyncio
import io
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks.harness.stalls import wait_until
from cluster.tracing import line_writer, logs

LIMIT_S = 60.0


class HungStream(io.StringIO):
    """Writes nothing until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.has_begun, self.may_end = threading.Event(), threading.Event()
        self.writers = set[threading.Thread]()

    def write(self, text: str) -> int:
        self.writers.add(threading.current_thread())
        self.has_begun.set()
        assert self.may_end.wait(LIMIT_S)
        return super().write(text)


@pytest.fixture(autouse=True)
def _long_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may be slow."""
    monkeypatch.setattr(line_writer, "LIMIT_S", LIMIT_S)


@pytest.fixture
def hung() -> Iterator[HungStream]:
    stream = HungStream()
    yield stream
    stream.may_end.set()


def logger_of(stream: io.StringIO) -> tuple[logging.Logger, logs.RecentLines]:
    recent = logs.RecentLines(stream=stream)
    recent.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.Logger("a logger")
    logger.addHandler(recent)
    return logger, recent


def test_an_event_loop_waits_for_no_line(hung: HungStream) -> None:
    logger, recent = logger_of(hung)

    async def log() -> None:
        for number in range(3):
            logger.warning("line %d", number)

    asyncio.run(log())
    assert hung.has_begun.wait(LIMIT_S)
    assert threading.main_thread() not in hung.writers
    assert recent.since(0)[1] == ["line 0", "line 1", "line 2"]
    hung.may_end.set()
    recent.flush()
    assert hung.getvalue() == "line 0\nline 1\nline 2\n"


def test_other_threads_wait_once(hung: HungStream, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    class Condition(threading.Condition):
        """Counts waits with a limit, whose time is over at once."""

        def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
            if timeout is None:
                return super().wait_for(predicate)
            waits.append(timeout)
            return False

    monkeypatch.setattr(line_writer, "Condition", Condition)
    logger, _ = logger_of(hung)
    for number in range(50):
        logger.warning("line %d", number)
    assert waits == [line_writer.LIMIT_S]


def test_a_line_is_written_when_its_call_returns() -> None:
    stream = io.StringIO()
    logger, _ = logger_of(stream)
    for number in range(100):
        logger.warning("%d", number)
        assert stream.getvalue().endswith(f"{number}\n")


def test_lines_that_wait_are_bounded(
    hung: HungStream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(line_writer, "MAX_WAITING", 5)
    logger, recent = logger_of(hung)

    async def log() -> None:
        for number in range(8):
            logger.warning("line %d", number)

    asyncio.run(log())
    hung.may_end.set()
    recent.flush()
    wait_until(lambda: "3 lines were lost" in caplog.text, "a report", LIMIT_S)
    assert hung.getvalue().splitlines() == [f"line {number}" for number in range(5)]
