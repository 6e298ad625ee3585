"""Times of the stages of a cluster's start, for the status.

    placing ─▶ every worker has registered ─▶ reading ─▶ all weights are read
        ─▶ warming up ─▶ every worker is ready ─▶ connecting ─▶ every edge is open

Workers pass the stages on their own. A stage of the cluster ends when its last worker has passed
it, and the start takes the sum of all stages.
"""

from __future__ import annotations

from typing import Any

from cluster.core.frames import (
    ControlFrame,
    GenerationReady,
    LoadProgress,
    Register,
    WorkerReady,
)

STAGES = ("placing", "reading", "warming_up", "connecting")


class StartTimes:
    """Records when the last worker passed each stage. Times are monotonic seconds."""

    def __init__(self, began_at: float) -> None:
        """``began_at``: time at which the start began."""
        self._began_at = began_at
        self._last: dict[str, tuple[float, str]] = {}
        """Time at which a worker last passed each stage, and the worker's name."""

    def take(self, worker: str, frame: ControlFrame, now: float) -> None:
        """Record the stage that a worker has passed, if ``frame`` shows that."""
        match frame:
            case Register():
                self._last["placing"] = (now, worker)
            case LoadProgress() if frame.loaded_bytes >= frame.total_bytes:
                self._last["reading"] = (now, worker)
            case WorkerReady():
                self._last["warming_up"] = (now, worker)
            case GenerationReady():
                self._last["connecting"] = (now, worker)

    def to_list(self) -> list[dict[str, Any]]:
        """Return the stages with their ``seconds`` and ``last_worker``, in their order.

        A stage that no worker has passed is left out. The list is empty after a failover.
        """
        before, stages = self._began_at, []
        for name in (stage for stage in STAGES if stage in self._last):
            at, worker = self._last[name]
            seconds, before = max(0.0, at - before), max(at, before)
            stages.append({"name": name, "seconds": round(seconds, 3), "last_worker": worker})
        return stages
