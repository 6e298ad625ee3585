"""The public compliance tests of Open Responses, and what becomes of each here.

Source: the tests of the specification of 2026-04-24, https://github.com/openresponses/openresponses
(src/lib/compliance-tests.ts); here in our own words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Case:
    """One of the tests."""

    name: str
    """Its id in the public suite."""
    asks: str
    """What it asks for."""
    result: Literal["passes", "refused"] = "passes"
    because: str = ""
    """Why it is refused, and how; or on what it depends."""


_NO_SOCKET = "WebSocket is not served: `/v1/responses` is `POST` only (405)"
_NO_COMPACTION = "`POST /v1/responses/compact` is not served (405)"
CASES = (
    Case("basic-response", "a response to one message, with all fields"),
    Case("streaming-response", "the events of a stream, with the response in the last event"),
    Case("system-prompt", "a `system` message before the user message"),
    Case(
        "tool-calling",
        "a `function_call` if a function is offered",
        because="if the model calls the function; requires a chat template with tools",
    ),
    Case("multi-turn", "a response to a conversation of several messages"),
    Case("assistant-phase", "assistant messages with `phase`"),
    Case(
        "response-output-phase-schema",
        "output messages with `phase` match the schema (no request is sent)",
        because="the field is optional and not sent",
    ),
    Case(
        "image-input",
        "a message with an image",
        "refused",
        "only text is accepted: 400 with `param` `input[0].content`",
    ),
    Case("compact-response", "compaction of a conversation", "refused", _NO_COMPACTION),
    Case("compact-missing-model", "compaction without a model", "refused", _NO_COMPACTION),
    Case("websocket-response", "a response over a WebSocket", "refused", _NO_SOCKET),
    Case(
        "websocket-sequential-responses", "two responses over one WebSocket", "refused", _NO_SOCKET
    ),
    Case(
        "websocket-continuation", "the second response continues the first", "refused", _NO_SOCKET
    ),
    Case(
        "websocket-reconnect-store-false-recovery",
        "a new connection has no state of the old one",
        "refused",
        _NO_SOCKET,
    ),
    Case(
        "websocket-previous-response-not-found",
        "the error code of an unknown `previous_response_id`",
        "refused",
        f"{_NO_SOCKET}; HTTP returns `previous_response_not_found`, too",
    ),
    Case(
        "websocket-failed-continuation-evicts-cache",
        "cached state after a failed request",
        "refused",
        _NO_SOCKET,
    ),
    Case("websocket-compact-new-chain", "a chain after compaction", "refused", _NO_SOCKET),
)
"""All seventeen."""
