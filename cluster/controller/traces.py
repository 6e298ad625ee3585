"""Traces of cluster changes, with span ids that gateways know while a change runs.

Gateways link the spans of requests that run during a change to the change's span. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from typing import Any

from cluster.controller.effects import RecordTrace
from cluster.core.codec import SPAN_ID_BYTES

_KEPT = 16
"""Maximum number of changes that the controller's snapshot lists."""


@dataclass(slots=True)
class OpenTrace:
    """Trace of a change of the cluster that runs or has ended."""

    name: str
    """Name of the change's span."""
    span_id: bytes
    seconds: float | None = None
    """Duration of the change in seconds; None while the change runs."""


class ChangeTraces:
    """The traces of the changes that one controller makes.

    Args:
        identity: identity of the controller, from which span ids derive.
        is_on: whether traces are exported; if not, the snapshot lists no change.
    """

    def __init__(self, identity: str, is_on: bool) -> None:
        self._identity = identity
        self._is_on = is_on
        self._numbers = count()
        self._newest: list[OpenTrace] = []

    def begin(self, name: str) -> OpenTrace:
        number = f"{self._identity}/{next(self._numbers)}".encode()
        span_id = blake2b(number, digest_size=SPAN_ID_BYTES, person=b"change").digest()
        opened = OpenTrace(name, span_id)
        self._newest.append(opened)
        if len(self._newest) > _KEPT:
            ended = (old for old in self._newest if old.seconds is not None)
            self._newest.remove(next(ended, self._newest[0]))
        return opened

    def end(
        self, opened: OpenTrace, seconds: float, attributes: Mapping[str, Any], error: str = ""
    ) -> RecordTrace:
        """End the trace of a change; return the effect that records the trace."""
        opened.seconds = seconds
        return RecordTrace(opened.name, seconds, attributes, error, opened.span_id)

    def to_list(self) -> list[dict[str, Any]]:
        """Return the newest changes, oldest first, for the snapshot that gateways get."""
        return [
            {"name": t.name, "span_id": t.span_id.hex(), "seconds": t.seconds}
            for t in (self._newest if self._is_on else ())
        ]
