"""Streams the events of one response."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import msgspec

from gateway.calls.running_call import RunningCall
from gateway.core.delta import ChoiceDelta, Finish
from gateway.core.errors import ErrorReport
from gateway.http.sse import DONE, EventStream
from gateway.responses.format import OutputFormat
from gateway.responses.output import Event, OutputBuilder
from gateway.responses.resource import Resource, ResourceFormat


@dataclass(kw_only=True, slots=True)
class _StreamState:
    """Mutable state of a stream."""

    sequence: int = 0
    """``sequence_number`` of the next event."""
    finish: Finish | None = None


@dataclass(kw_only=True, slots=True)
class ResponseStream(EventStream):
    """A stream of the numbered events of one response."""

    builder: OutputBuilder
    output: OutputFormat
    resource: ResourceFormat
    complete: Callable[[Finish], Awaitable[Resource]]
    """Builds and stores the complete response."""
    _state: _StreamState = field(default_factory=_StreamState)

    def _opening(self) -> bytes:
        response = self.resource.initial_response()
        names = ("response.created", "response.in_progress")
        return self._encode_events({"type": name, "response": response} for name in names)

    def _events(self, running: RunningCall, deltas: list[ChoiceDelta]) -> bytes:
        for delta in deltas:
            self._state.finish = delta.finish
        return self._encode_events(merge_deltas(self.output.feed(deltas)))

    async def _ending(self, running: RunningCall) -> bytes:
        assert self._state.finish is not None, "the choice has not finished"
        response = await self.complete(self._state.finish)
        ended = {"type": f"response.{response['status']}", "response": response}
        return self._encode_events([ended]) + DONE

    def _failure(self, report: ErrorReport) -> bytes:
        error = report.body()["error"]
        flat = {name: error[name] for name in ("code", "message", "param")}
        failed = self.resource.failed_response(self.builder.output(), report)
        events: list[Event] = [
            {"type": "error", **flat, "error": error},
            {"type": "response.failed", "response": failed},
        ]
        return self._encode_events(events) + DONE

    def _encode_events(self, events: Iterable[Event]) -> bytes:
        written = []
        for event in events:
            numbered = {**event, "sequence_number": self._state.sequence}
            self._state.sequence += 1
            written.append(self._event(msgspec.json.encode(numbered), event["type"].encode()))
        return b"".join(written)


def merge_deltas(events: Sequence[Event]) -> list[Event]:
    """Merge consecutive delta events of the same item."""
    merged: list[Event] = []
    for (kind, _), group in groupby(events, key=lambda e: (e["type"], e.get("item_id"))):
        pieces = list(group)
        if len(pieces) == 1 or not kind.endswith(".delta"):
            merged += pieces
            continue
        whole = {**pieces[0], "delta": "".join(piece["delta"] for piece in pieces)}
        if "logprobs" in whole:
            whole["logprobs"] = [one for piece in pieces for one in piece["logprobs"]]
        merged.append(whole)
    return merged
