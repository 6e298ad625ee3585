"""Runs sections, each in a process that is ended at its time limit.

Sections about correctness may run in parallel; sections that measure speed run alone after them.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any, Literal

from benchmarks.gpu_check.section import Section
from cluster.cli.terminal.output import table, write_line

FILE = "gpu_check.jsonl"
"""A line for each section of each run."""
Status = Literal["ok", "failed", "timed out", "skipped", "no time"]
"""``skipped``: the device does not suit; ``no time``: too little of the budget was left."""
_NOT_RUN: Sequence[Status] = ("skipped", "no time")
_END_LIMIT_S = 10.0
_LOOK_S = 0.5
"""Interval at which a section checks whether it must end."""
_LINE_CHARACTERS = 100


@dataclass(kw_only=True, slots=True)
class Outcome:
    """Result of a section."""

    section: str
    status: Status = "ok"
    reason: str = ""
    """Reason why the section did not run, or its summary line."""
    seconds: float = 0.0
    limit_s: float = 0.0
    is_correctness: bool = False
    failures: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, section: Section, limit_s: float) -> Outcome:
        """Create the outcome of a section with a time limit; 0 if there is too little time."""
        return cls(
            section=section.name, limit_s=round(limit_s, 1), is_correctness=section.is_correctness
        )

    @property
    def words(self) -> str:
        """Summary in one short line."""
        lines = [*(self.failures or [self.reason]), ""]
        first = lines[0].splitlines()[0] if lines[0] else ""
        more = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
        return first[:_LINE_CHARACTERS] + more


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Options of a run."""

    budget_s: float
    """Time budget of all sections together."""
    out: Path
    """Folder for the results."""
    device: str
    is_tiny: bool = False
    jobs: int = 1
    """Number of sections about correctness that run in parallel."""


def run(sections: Sequence[Section], settings: Settings) -> list[Outcome]:
    """Run sections in order; each is printed and written to the file when it has ended."""
    settings.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + settings.budget_s
    width = max((len(section.name) for section in sections), default=0)
    journal = _Journal(settings.out / FILE, width)
    together = [s for s in sections if s.is_correctness and settings.jobs > 1]
    alone = [section for section in sections if section not in together]
    outcomes = _run_together(together, alone, deadline, settings, journal)
    for i, section in enumerate(alone):
        left_s = deadline - time.monotonic()
        outcome = Outcome.of(section, limit_of(alone[i:], left_s))
        _run_one(section, outcome, left_s, settings, Event())
        outcomes.append(journal.add(outcome))
    return outcomes


class _Journal:
    """Prints and writes the outcomes of sections."""

    def __init__(self, file: Path, width: int) -> None:
        """Create a journal for names of at most ``width`` characters."""
        self._file, self._width = file, width
        self._began = datetime.now(tz=UTC).isoformat(timespec="seconds")

    def add(self, outcome: Outcome) -> Outcome:
        """Print, write and return the outcome."""
        entry = {"run": self._began, **asdict(outcome)}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")
        shown = f"{outcome.status:9}  {outcome.seconds:5.1f} s  {outcome.words}"
        write_line(f"{outcome.section:{self._width}}  {shown}".rstrip())
        return outcome


def _run_together(
    sections: Sequence[Section],
    later: Sequence[Section],
    deadline: float,
    settings: Settings,
    journal: _Journal,
) -> list[Outcome]:
    """Run sections in parallel, the longest first; ``later`` run after them."""
    began = time.monotonic()
    last = began + limit_together(sections, later, settings.jobs, deadline - began)
    stop = Event()

    def run_one(section: Section) -> Outcome:
        left_s = last - time.monotonic()
        outcome = Outcome.of(section, left_s if left_s >= section.least_s else 0.0)
        _run_one(section, outcome, left_s, settings, stop)
        return outcome

    with ThreadPoolExecutor(settings.jobs) as pool:
        by_length = sorted(sections, key=lambda section: -section.seconds)
        futures = {section: pool.submit(run_one, section) for section in by_length}
        try:
            return [journal.add(futures[section].result()) for section in sections]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop.set()
            raise


def limit_together(
    sections: Sequence[Section], later: Sequence[Section], jobs: int, left_s: float
) -> float:
    """Seconds for parallel sections, from the time that is left for them and for ``later``.

    Two jobs for parts of 30, 60 and 30, 180 s left, and 30 later: 120.
    """
    parts = [section.seconds for section in sections]
    whole = max(max(parts, default=0.0), sum(parts) / jobs)
    return left_s * whole / ((whole + sum(section.seconds for section in later)) or 1.0)


def limit_of(sections: Sequence[Section], left_s: float) -> float:
    """Seconds for the first section: its part of the time left; 0 if less than its minimum.

    What a section does not need, those after it have. Parts of 30 and 60 and 180 s left: 60, and
    with a least of 70: 70.
    """
    first = sections[0]
    share = left_s * (first.seconds / sum(section.seconds for section in sections))
    limit = max(share, first.least_s)
    return limit if limit <= left_s else 0.0


def exit_code(outcomes: Iterable[Outcome]) -> int:
    """Return 1 if a section about correctness failed, did not end or had no time."""
    good: Sequence[Status] = ("ok", "skipped")
    return int(any(o.is_correctness and o.status not in good for o in outcomes))


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return the final table."""
    rows = [
        (o.section, o.status, "" if o.status in _NOT_RUN else f"{o.seconds:.1f}", o.words)
        for o in outcomes
    ]
    return table(("SECTION", "RESULT", "SECONDS", "FOUND"), rows)


def _run_one(
    section: Section, outcome: Outcome, left_s: float, settings: Settings, stop: Event
) -> None:
    if section.needs_gpu and not settings.device.startswith("cuda"):
        outcome.status, outcome.reason = "skipped", "needs a GPU"
    elif not outcome.limit_s:
        outcome.status = "no time"
        outcome.reason = f"needs {section.least_s:.0f} s, {max(left_s, 0.0):.0f} s are left"
    else:
        _follow(section, settings, outcome, stop)
        if outcome.failures and outcome.status == "ok":
            outcome.status = "failed"


def _follow(section: Section, settings: Settings, outcome: Outcome, stop: Event) -> None:
    """Read the lines of the section's process until it reports its end, or until ``stop``."""
    log, limit_s = settings.out / f"{section.name}.log", outcome.limit_s
    start = time.monotonic()
    is_done = False
    with log.open("w") as errors, tempfile.TemporaryDirectory() as folder:
        words = (section.function, settings.device, str(limit_s), str(settings.is_tiny), folder)
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_check.child", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=_environment(section, settings.jobs),
            start_new_session=True,
        )
        try:
            for line in _lines(process, start + limit_s, stop):
                is_done = _take(json.loads(line), outcome)
        except TimeoutError:
            outcome.status = "timed out"
            outcome.failures.append(f"not done within {limit_s:.0f} s, see {log.name}")
        finally:
            _end(process)
    outcome.seconds = round(time.monotonic() - start, 1)
    if not is_done and outcome.status == "ok":
        outcome.failures.append(f"its process ended: {_last_line(log)}")


def _environment(section: Section, jobs: int) -> dict[str, str]:
    """Environment that divides the cores among parallel sections."""
    if not section.is_correctness or jobs == 1:
        return dict(os.environ)
    threads = max((os.cpu_count() or 1) // jobs, 1)
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


def _take(entry: Mapping[str, Any], outcome: Outcome) -> bool:
    """Apply a line of ``Report``; returns whether it is the last one."""
    match entry:
        case {"value": [str(name), value]}:
            outcome.values[name] = value
        case {"failure": str(failure)}:
            outcome.failures.append(failure)
        case {"say": str(reason)}:
            outcome.reason = reason
    return "done" in entry


def _lines(process: subprocess.Popen[bytes], deadline: float, stop: Event) -> Iterator[bytes]:
    """Yield lines of a process until its stdout ends, or ``stop``. Raises ``TimeoutError``."""
    assert process.stdout is not None
    file, data = process.stdout.fileno(), b""
    with selectors.DefaultSelector() as selector:
        selector.register(file, selectors.EVENT_READ)
        while not stop.is_set():
            left_s = deadline - time.monotonic()
            if not selector.select(max(min(left_s, _LOOK_S), 0.0)):
                if left_s <= 0:
                    raise TimeoutError
                continue
            if not (chunk := os.read(file, 1 << 16)):
                return
            *lines, data = (data + chunk).split(b"\n")
            yield from lines


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the section's process with all its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(_END_LIMIT_S)
    assert process.stdout is not None
    process.stdout.close()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "nothing was printed"
