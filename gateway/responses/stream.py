"""The events of one response, as they are sent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from gateway.core.delta import ChoiceDelta, Finish
from gateway.core.errors import ErrorReport
from gateway.generation.generation import Generation
from gateway.http.middleware import dump_json
from gateway.http.sse import DONE, PING, EventStream
from gateway.responses.format import OutputFormat
from gateway.responses.output import Event, OutputBuilder
from gateway.responses.resource import Resource, ResourceFormat


@dataclass(kw_only=True, slots=True)
class ResponseStream(EventStream):
    """Named events, each with its number; the last one has the whole response."""

    builder: OutputBuilder
    output: OutputFormat
    resource: ResourceFormat
    complete: Callable[[Finish], Awaitable[Resource]]
    """The response at the end; stores it."""
    number: int = 0
    """``sequence_number`` of the next event."""
    finish: Finish | None = None

    def _pieces(self, generation: Generation, deltas: Sequence[ChoiceDelta]) -> bytes:
        for delta in deltas:
            self.finish = delta.finish
        return self._start() + self._dump(joined(self.output.feed(deltas)))

    def _ping(self, generation: Generation) -> bytes:
        return self._start() + PING

    async def _end(self, generation: Generation) -> bytes:
        assert self.finish is not None, "the choice has ended"
        response = await self.complete(self.finish)
        return self._dump([{"type": f"response.{response['status']}", "response": response}]) + DONE

    def _error(self, report: ErrorReport) -> bytes:
        error = report.body()["error"]
        flat = {name: error[name] for name in ("code", "message", "param")}
        failed = self.resource.failed(self.builder.output(), report)
        events: list[Event] = [
            {"type": "error", **flat, "error": error},
            {"type": "response.failed", "response": failed},
        ]
        return self._start() + self._dump(events) + DONE

    def _start(self) -> bytes:
        if self.number:
            return b""
        response = self.resource.begun()
        names = ("response.created", "response.in_progress")
        return self._dump({"type": name, "response": response} for name in names)

    def _dump(self, events: Iterable[Event]) -> bytes:
        written = []
        for event in events:
            data = dump_json({**event, "sequence_number": self.number})
            written.append(b"event: %b\ndata: %b\n\n" % (event["type"].encode(), data))
            self.number += 1
        self.gateway.metrics.sse_events.inc(len(written))
        return b"".join(written)


def joined(events: Sequence[Event]) -> list[Event]:
    """The same events, with those as one that go on with the same text."""
    found: list[Event] = []
    for (kind, _), group in groupby(events, key=lambda e: (e["type"], e.get("item_id"))):
        pieces = list(group)
        if len(pieces) == 1 or not kind.endswith(".delta"):
            found += pieces
            continue
        whole = {**pieces[0], "delta": "".join(piece["delta"] for piece in pieces)}
        if "logprobs" in whole:
            whole["logprobs"] = [one for piece in pieces for one in piece["logprobs"]]
        found.append(whole)
    return found
