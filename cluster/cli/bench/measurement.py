"""Results of a workload at one server, complete or up to an interrupt."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any

from cluster.cli.bench.document import document_of
from cluster.cli.bench.workload import BenchTarget, Workload, run_workload
from cluster.cli.bench.workload_options import options_of
from cluster.cli.terminal.output import note
from cluster.cli.terminal.progress import Progress
from cluster.workload.tally import Tally

_TICK_S = 0.2
_LATE_MS = 10.0
"""A warning is shown if a tenth of the requests is sent more than this many milliseconds late."""


class Measurement:
    """Accumulates one server's results over the parts of a workload that have run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.tally = Tally(dict(args.goodput))
        self.load: Workload | None = None
        """The whole workload; None before its first part."""
        self.is_interrupted = False
        self._args = args
        self._duration_s = 0.0
        self._shown_at = 0.0

    async def run(
        self, load: Workload, part: Workload, target: BenchTarget, progress: Progress
    ) -> None:
        """Run ``part`` of workload ``load``. A progress bar counts ended requests of ``load``."""

        def tick() -> None:
            if time.monotonic() - self._shown_at >= _TICK_S:
                self._shown_at = time.monotonic()
                progress.update(f"{self.tally.ended} of {len(load.arrivals)} requests")

        self.load = load
        earlier_s, began = self._duration_s, time.monotonic()
        try:
            await run_workload(part, target, self.tally, tick)
        finally:
            self._duration_s = earlier_s + time.monotonic() - began

    def document(self, url: str) -> dict[str, Any]:
        """Make the document of ``bench serve``. Requires that a part of the workload has begun."""
        assert self.load is not None
        protocol = "http" if getattr(self._args, "grpc", None) is None else "grpc"
        return document_of(
            "bench serve",
            {**options_of(self._args, self.load), "protocol": protocol},
            self.tally.results(self._duration_s),
            url=url,
            interrupted=self.is_interrupted,
        )


def warn_if_late(document: Mapping[str, Any]) -> None:
    """Print a warning if requests were sent later than scheduled."""
    late_ms = document["results"]["sent_late_ms"]["p90"]
    is_open = document["options"].get("request_rate") or "trace" in document["options"]
    if is_open and late_ms is not None and late_ms > _LATE_MS:
        note(
            f"expertmesh: a tenth of the requests was sent over {late_ms:.0f} ms late, which no "
            f"latency includes: raise --max-concurrency, or give this client more CPU time"
        )
