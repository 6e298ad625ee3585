"""Results of the rows of a fault table, and the table itself. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.report.results import table


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultRow:
    """One row of a table."""

    name: str
    """For ``--rows``."""
    text: str
    """For people."""
    limit: str
    """Pause that is asked for, median / worst."""


@dataclass(slots=True)
class Found:
    """What came of one row."""

    stalls_s: list[float] = field(default_factory=list)
    """Longest pause of any stream, by repetition."""
    calm_s: list[float] = field(default_factory=list)
    """Longest pause in the second before, by repetition."""
    failures: list[str] = field(default_factory=list)
    """Calls that failed."""
    num_lost: list[int] = field(default_factory=list)
    """Workers that were declared lost or drained, by repetition."""
    note: str = ""
    """Why there are fewer repetitions."""


def lost(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Workers that served in one snapshot of a cluster, and are lost or drained in a later one."""
    served = {w["name"] for w in before["workers"] if w["state"] == "SERVING"}
    ended = {w["name"] for w in after["workers"] if w["state"] in ("LOST", "DRAINED")}
    return sorted(served & ended)


def report(rows: Sequence[FaultRow], found: Mapping[str, Found]) -> str:
    """One line for each row that was measured."""
    head = ["fault", "required pause, median / worst", "median pause, s", "worst pause, s"]
    head += ["pause without fault, s", "lost workers", "repetitions", "failed calls"]
    lines = []
    for row in rows:
        if row.name not in found:
            continue
        mine = found[row.name]
        numbers = ["-", "-", "-"]
        if mine.stalls_s:
            calm = statistics.median(mine.calm_s)
            numbers = [*_pause(mine), f"{calm:.2f}"]
        times = f"{len(mine.stalls_s)}{f' ({mine.note})' if mine.note else ''}"
        counts = [_range(mine.num_lost), times, str(len(mine.failures))]
        lines.append([row.text, row.limit, *numbers, *counts])
    return table(head, lines)


def page_rows(rows: Sequence[FaultRow], found: Mapping[str, Found]) -> str:
    """The same as rows of the table in ``docs/reference/reliability.md``."""
    measured = [row for row in rows if row.name in found and found[row.name].stalls_s]
    return "\n".join(
        f"| {row.text} | {row.limit} | {' / '.join(_pause(found[row.name]))} s |"
        for row in measured
    )


def _pause(found: Found) -> tuple[str, str]:
    return f"{statistics.median(found.stalls_s):.2f}", f"{max(found.stalls_s):.2f}"


def _range(counts: Sequence[int]) -> str:
    """Fewest and most: ``1``, or ``0-2``."""
    if not counts:
        return "-"
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low}-{high}"
