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
    Case("basic-response", "an answer to one message, with all fields of a response"),
    Case("streaming-response", "the events of an answer, and the response in the last one"),
    Case("system-prompt", "a message of the role `system` before the user's"),
    Case(
        "tool-calling",
        "a `function_call` where a function is offered",
        because="where the model calls it; the chat template must have tools",
    ),
    Case("multi-turn", "an answer to a conversation of several messages"),
    Case("assistant-phase", "messages of the assistant with `phase`"),
    Case(
        "response-output-phase-schema",
        "output messages with `phase` fit the schema (no request is sent)",
        because="the field is optional, and not sent here",
    ),
    Case(
        "image-input",
        "a message with an image",
        "refused",
        "only text is read: 400 with `param` `input[0].content`",
    ),
    Case("compact-response", "a conversation made shorter", "refused", _NO_COMPACTION),
    Case("compact-missing-model", "the same without a model", "refused", _NO_COMPACTION),
    Case("websocket-response", "an answer over a WebSocket", "refused", _NO_SOCKET),
    Case("websocket-sequential-responses", "two answers over one", "refused", _NO_SOCKET),
    Case("websocket-continuation", "the second continues the first", "refused", _NO_SOCKET),
    Case(
        "websocket-reconnect-store-false-recovery",
        "a new connection knows nothing of the old one",
        "refused",
        _NO_SOCKET,
    ),
    Case(
        "websocket-previous-response-not-found",
        "the code of an unknown `previous_response_id`",
        "refused",
        f"{_NO_SOCKET}; over HTTP it is `previous_response_not_found` too",
    ),
    Case(
        "websocket-failed-continuation-evicts-cache",
        "what a failed request leaves behind",
        "refused",
        _NO_SOCKET,
    ),
    Case("websocket-compact-new-chain", "a chain after compaction", "refused", _NO_SOCKET),
)
"""All seventeen."""
