from __future__ import annotations

import io

from cluster.cli.terminal.progress import INTERVAL_S, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_a_line_comes_every_few_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, clock)
    progress.update("ray")
    assert stream.getvalue() == ""
    clock.now = INTERVAL_S
    progress.tick()
    progress.tick()
    assert stream.getvalue() == "expertmesh: starting Ray, 5 s\n"
    clock.now = 2 * INTERVAL_S
    progress.update("weights", 30_000_000, 60_000_000)
    assert stream.getvalue().splitlines()[1] == "expertmesh: loading weights 30 of 60 MB, 10 s"
    progress.clear()


def test_without_a_terminal_there_may_be_nothing() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, clock, lines=False)
    progress.update("drain-1.1 attention-1: moving its requests")
    clock.now = 2 * INTERVAL_S
    progress.tick()
    progress.clear()
    assert stream.getvalue() == ""


def test_on_a_terminal_there_is_a_bar() -> None:
    stream, clock = Terminal(), Clock()
    progress = Progress(stream, clock)
    progress.update("weights", 30_000_000, 60_000_000)
    assert "[############............] 30 of 60 MB, 0 s" in stream.getvalue()
    assert "\n" not in stream.getvalue()
    progress.clear()
    assert stream.getvalue().endswith(" \r")


def test_a_stage_without_a_name_is_shown_as_it_is() -> None:
    stream, clock = Terminal(), Clock()
    Progress(stream, clock).update("something new")
    assert "something new" in stream.getvalue()
