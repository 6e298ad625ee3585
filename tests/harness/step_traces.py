"""Reading the timelines that workers write."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.metrics.step_trace import SUFFIX


@dataclass(frozen=True, slots=True)
class Seen:
    """One span of a trace file."""

    worker: str
    name: str
    start_us: float
    end_us: float
    args: dict[str, Any]


def events_of(file: Path) -> list[dict[str, Any]]:
    """All events of one file, whether its writer has ended or not."""
    text = file.read_text().rstrip()
    events: list[dict[str, Any]] = json.loads(text if text.endswith("]") else f"{text}]")
    return events


def read_spans(folder: Path) -> list[Seen]:
    """The spans of all workers."""
    found = []
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        events = events_of(file)
        (worker,) = [e["args"]["name"] for e in events if e["name"] == "process_name"]
        found += [
            Seen(worker, e["name"], e["ts"], e["ts"] + e["dur"], e["args"])
            for e in events
            if e["ph"] == "X"
        ]
    return found
