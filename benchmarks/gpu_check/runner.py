"""Runs sections one after the other, each in a process that is ended at its limit."""

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
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu_check.section import Section
from cluster.cli.terminal.output import out_line, table

FILE = "gpu_check.jsonl"
"""A line for each section of each run."""
Status = Literal["ok", "failed", "timed out", "skipped", "no time"]
"""``skipped``: not for this device; ``no time``: too little of the budget was left for it."""
_NOT_RUN: Sequence[Status] = ("skipped", "no time")
_END_LIMIT_S = 10.0
_LINE_CHARACTERS = 100


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What came of a section."""

    section: str
    status: Status = "ok"
    reason: str = ""
    """Why it was not run, or what it says in a few words."""
    seconds: float = 0.0
    limit_s: float = 0.0
    is_correctness: bool = False
    failures: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """One line, not a long one."""
        lines = [*(self.failures or [self.reason]), ""]
        first = lines[0].splitlines()[0] if lines[0] else ""
        more = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
        return first[:_LINE_CHARACTERS] + more


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How sections are run."""

    budget_s: float
    """Of all of them together."""
    out: Path
    """Folder for what they find."""
    device: str
    is_tiny: bool = False


def run(sections: Sequence[Section], settings: Settings) -> list[Outcome]:
    """Run them in their order; each is printed and written to the file when it has ended."""
    settings.out.mkdir(parents=True, exist_ok=True)
    began, outcomes = datetime.now(tz=UTC).isoformat(timespec="seconds"), []
    deadline = time.monotonic() + settings.budget_s
    width = max((len(section.name) for section in sections), default=0)
    for i, section in enumerate(sections):
        left_s = deadline - time.monotonic()
        outcome = _run_one(section, limit_of(sections[i:], left_s), left_s, settings)
        outcomes.append(outcome)
        with (settings.out / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": began, **asdict(outcome)}, allow_nan=False) + "\n")
        shown = f"{outcome.status:9}  {outcome.seconds:5.1f} s  {outcome.words}"
        out_line(f"{section.name:{width}}  {shown}".rstrip())
    return outcomes


def limit_of(sections: Sequence[Section], left_s: float) -> float:
    """Seconds of the first of some sections: its part of what is left; 0: not even its least.

    What a section does not need, those after it have. Parts of 30 and 60 and 180 s left: 60, and
    with a least of 70: 70.
    """
    first = sections[0]
    share = left_s * (first.seconds / sum(section.seconds for section in sections))
    limit = max(share, first.least_s)
    return limit if limit <= left_s else 0.0


def exit_code(outcomes: Iterable[Outcome]) -> int:
    """1 where a section about correctness failed, did not end, or had no time."""
    good: Sequence[Status] = ("ok", "skipped")
    return int(any(o.is_correctness and o.status not in good for o in outcomes))


def summary(outcomes: Sequence[Outcome]) -> str:
    """The table that comes last."""
    rows = [
        (o.section, o.status, "" if o.status in _NOT_RUN else f"{o.seconds:.1f}", o.words)
        for o in outcomes
    ]
    return table(("SECTION", "RESULT", "SECONDS", "FOUND"), rows)


def _run_one(section: Section, limit_s: float, left_s: float, settings: Settings) -> Outcome:
    outcome = Outcome(
        section=section.name, limit_s=round(limit_s, 1), is_correctness=section.is_correctness
    )
    if section.needs_gpu and not settings.device.startswith("cuda"):
        outcome.status, outcome.reason = "skipped", "needs a GPU"
    elif not limit_s:
        outcome.status = "no time"
        outcome.reason = f"needs {section.least_s:.0f} s, {max(left_s, 0.0):.0f} s are left"
    else:
        _follow(section, limit_s, settings, outcome)
        if outcome.failures and outcome.status == "ok":
            outcome.status = "failed"
    return outcome


def _follow(section: Section, limit_s: float, settings: Settings, outcome: Outcome) -> None:
    """Take in what the section's process writes, until it says that it is done."""
    log = settings.out / f"{section.name}.log"
    start = time.monotonic()
    is_done = False
    with log.open("w") as errors, tempfile.TemporaryDirectory() as folder:
        words = (section.function, settings.device, str(limit_s), str(settings.is_tiny), folder)
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_check.child", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        try:
            for line in _lines(process, start + limit_s):
                is_done = _take(json.loads(line), outcome)
        except TimeoutError:
            outcome.status = "timed out"
            outcome.failures.append(f"not done within {limit_s:.0f} s, see {log.name}")
        finally:
            _end(process)
    outcome.seconds = round(time.monotonic() - start, 1)
    if not is_done and outcome.status == "ok":
        outcome.failures.append(f"its process ended: {_last_line(log)}")


def _take(entry: Mapping[str, Any], outcome: Outcome) -> bool:
    """A line of ``Report``; returns whether it is the last one."""
    match entry:
        case {"value": [str(name), value]}:
            outcome.values[name] = value
        case {"failure": str(failure)}:
            outcome.failures.append(failure)
        case {"say": str(reason)}:
            outcome.reason = reason
    return "done" in entry


def _lines(process: subprocess.Popen[bytes], deadline: float) -> Iterator[bytes]:
    """Whole lines of a process, until it closes its stdout. Raises ``TimeoutError``."""
    assert process.stdout is not None
    file, data = process.stdout.fileno(), b""
    with selectors.DefaultSelector() as selector:
        selector.register(file, selectors.EVENT_READ)
        while True:
            if not selector.select(max(deadline - time.monotonic(), 0.0)):
                raise TimeoutError
            if not (chunk := os.read(file, 1 << 16)):
                return
            *lines, data = (data + chunk).split(b"\n")
            yield from lines


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the section's process with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(_END_LIMIT_S)
    assert process.stdout is not None
    process.stdout.close()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "nothing was printed"
