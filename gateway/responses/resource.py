"""The response object: the output and the parameters of one request."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.calls.running_call import RunningCall
from gateway.core.delta import Finish, Usage
from gateway.core.errors import ErrorReport
from gateway.responses.items import Item
from workers.requests.request import FinishReason

Resource = dict[str, Any]
"""The response object."""


@dataclass(frozen=True, slots=True)
class ResourceFormat:
    """Builds the response object at the start and at the end of a request.

    Args:
        running: the call.
        repeated_fields: see ``CheckedRequest``.
        is_stored: whether the response will be stored.
    """

    running: RunningCall
    repeated_fields: Mapping[str, Any]
    is_stored: bool

    def initial_response(self) -> Resource:
        """Return the response object before the first token."""
        return self._resource("in_progress", [])

    def final_response(
        self, output: Sequence[Item], finish: Finish, num_reasoning: int, is_stored: bool
    ) -> Resource:
        """Return the response object at the end of the choice.

        Args:
            output: all items.
            finish: the end of the choice, with its reason.
            num_reasoning: number of reasoning tokens.
            is_stored: whether the response was stored. Storing it may have failed.
        """
        is_cut = finish.reason is FinishReason.LENGTH
        resource = self._resource("incomplete" if is_cut else "completed", output)
        return {
            **resource,
            "completed_at": None if is_cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "store": is_stored,
            "usage": response_usage(self.running.usage, num_reasoning),
        }

    def failed_response(self, output: Sequence[Item], report: ErrorReport) -> Resource:
        """Return the response object of a request that failed."""
        error = {"code": _error_code(report), "message": report.message}
        return {**self._resource("failed", output), "store": False, "error": error}

    def _resource(self, status: str, output: Sequence[Item]) -> Resource:
        return {
            "id": self.running.call_id,
            "object": "response",
            "created_at": self.running.created,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self.running.call.model,
            "output": list(output),
            "usage": None,
            "store": self.is_stored,
            **self.repeated_fields,
        }


def response_usage(usage: Usage, num_reasoning: int) -> dict[str, Any]:
    """Return the ``usage`` of a response. ``cache_write_tokens`` is always 0."""
    cached = {"cached_tokens": usage.cached_tokens or 0, "cache_write_tokens": 0}
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": cached,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": num_reasoning},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _error_code(report: ErrorReport) -> str:
    """Return OpenAI's error code for status 429 and 5xx, and ``report.code`` for other errors."""
    if report.http_status == 429:
        return "rate_limit_exceeded"
    return "server_error" if report.http_status >= 500 else report.code
