"""The routes of Anthropic's Messages API."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.routing import Route

from gateway.anthropic.blocks import Event, ShownThinking
from gateway.anthropic.convert import chat_input, message_call, shows_thinking
from gateway.anthropic.format import MessageFormat
from gateway.anthropic.schema import CountTokensBody, MessagesBody, ThinkingParam
from gateway.anthropic.unsupported import check_unsupported
from gateway.calls.answer import collect
from gateway.calls.gateway import Gateway
from gateway.calls.running_call import RunningCall
from gateway.core.call import ChatInput, GenerateCall
from gateway.core.delta import ChoiceDelta
from gateway.core.errors import ErrorReport
from gateway.core.field_checks import require
from gateway.core.headers import with_headers
from gateway.core.protocols import MESSAGES, error_event
from gateway.http.json_output import dump_json
from gateway.http.middleware import CancellableEndpoint, Responder
from gateway.http.parse import parse_body
from gateway.http.request_body import timeout_header_s, using_model
from gateway.http.sse import EventStream

OLDEST_VERSION = "2023-06-01"
"""Oldest accepted value of the optional header ``anthropic-version``. Earlier versions have another
event format. Fields that version 2026-10-21 removed, such as ``temperature``, remain accepted."""
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_PING: Event = {"type": "ping"}


def routes(gateway: Gateway) -> list[Route]:
    return [
        Route(MESSAGES, MessagesEndpoint(gateway), methods=["POST"]),
        Route(f"{MESSAGES}/count_tokens", CountTokensEndpoint(gateway), methods=["POST"]),
    ]


class _MessageRequest(NamedTuple):
    """A parsed call. It does not refer to the body, so that a large body is freed early."""

    call: GenerateCall
    streams: bool
    thinking: ShownThinking


class MessagesEndpoint(CancellableEndpoint[_MessageRequest]):
    """``POST /v1/messages``."""

    def _parse(self, request: Request, data: dict[str, Any]) -> _MessageRequest:
        _check_version(request)
        check_unsupported(data)
        body = parse_body(MessagesBody, data)
        call = with_headers(message_call(body), request.headers, timeout_header_s(request))
        return _MessageRequest(call, bool(body.stream), _shown_thinking(body.thinking))

    async def _respond(
        self, request: Request, parsed: _MessageRequest, responder: Responder
    ) -> None:
        call, streams, thinking = parsed
        with await self._gateway.start(call, f"msg_{uuid.uuid4().hex}") as running:
            formatter = MessageFormat(running, running.tokenizer, thinking)
            if not streams:
                (choice,) = await collect(running)
                await responder.json(formatter.response_body(choice, running.usage))
                return
            stream = MessageStream(
                gateway=self._gateway,
                responder=responder,
                formatter=formatter,
                request_id=request.state.request_id,
            )
            await stream.send(running)


class CountTokensEndpoint(CancellableEndpoint[tuple[str, ChatInput]]):
    """``POST /v1/messages/count_tokens``."""

    def _parse(self, request: Request, data: dict[str, Any]) -> tuple[str, ChatInput]:
        _check_version(request)
        check_unsupported(data)
        body = parse_body(CountTokensBody, data)
        return body.model, chat_input(body)

    async def _respond(
        self, request: Request, parsed: tuple[str, ChatInput], responder: Responder
    ) -> None:
        model, chat = parsed
        async with using_model(request, self._gateway, model) as gateway:
            count = await gateway.prompts.count_tokens(chat)
        await responder.json({"input_tokens": count})


@dataclass(kw_only=True, slots=True)
class MessageStream(EventStream):
    """Sends the events of a message, which have names."""

    formatter: MessageFormat
    has_started: bool = False

    def _events(self, running: RunningCall, deltas: list[ChoiceDelta]) -> bytes:
        events = self._start(running)
        events += [event for delta in deltas for event in self.formatter.events(delta)]
        return self._dump(events)

    def _ping(self, running: RunningCall) -> bytes:
        return self._dump([*self._start(running), _PING])

    async def _ending(self, running: RunningCall) -> bytes:
        return self._dump(self.formatter.end(running.usage))

    def _failure(self, report: ErrorReport) -> bytes:
        self.gateway.metrics.sse_events.inc()
        return error_event(MESSAGES, report, self.request_id)

    def _start(self, running: RunningCall) -> list[Event]:
        if self.has_started:
            return []
        self.has_started = True
        return [self.formatter.start(running.usage)]

    def _dump(self, events: Sequence[Event]) -> bytes:
        self.gateway.metrics.sse_events.inc(len(events))
        return b"".join(
            f"event: {event['type']}\ndata: ".encode() + dump_json(event) + b"\n\n"
            for event in events
        )


def _check_version(request: Request) -> None:
    name = "anthropic-version"
    version = request.headers.get(name, OLDEST_VERSION)
    is_known = _DATE.fullmatch(version) is not None and version >= OLDEST_VERSION
    require(is_known, name, f"({version[:32]!r}) must be a date from {OLDEST_VERSION} on")


def _shown_thinking(thinking: ThinkingParam | None) -> ShownThinking:
    if thinking is None or not shows_thinking(thinking):
        return "none"
    return "omitted" if thinking.display == "omitted" else "all"
