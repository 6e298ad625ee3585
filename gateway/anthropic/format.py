"""Formats running calls as Anthropic messages: response bodies and stream events."""

from __future__ import annotations

from typing import Any

from gateway.anthropic.blocks import BlockWriter, Event, ShownThinking, collect_blocks
from gateway.calls.answer import TextFormat
from gateway.calls.running_call import RunningCall
from gateway.core.delta import ChoiceDelta, Finish, Usage
from gateway.text.tokenizer import Tokenizer
from workers.requests.request import FinishReason


class MessageFormat(TextFormat):
    """Formats the only choice of a running call as a message.

    Args:
        running: the call.
        tokenizer: the tokenizer of the model.
        thinking: the part of the reasoning that the client receives.
    """

    def __init__(
        self, running: RunningCall, tokenizer: Tokenizer | None, thinking: ShownThinking
    ) -> None:
        super().__init__(running.call, tokenizer)
        self._head = {
            "id": running.call_id,
            "type": "message",
            "role": "assistant",
            "model": running.call.model,
        }
        self._blocks = BlockWriter(thinking)
        self._ending: Event = {}

    def response_body(self, choice: ChoiceDelta, usage: Usage) -> dict[str, Any]:
        """Return the body of a response that is not streamed."""
        content = collect_blocks(self.events(choice))
        return {**self._head, "content": content, **self._ending, "usage": message_usage(usage)}

    def start(self, usage: Usage) -> Event:
        """Return the first event."""
        empty: Event = {"content": [], "stop_reason": None, "stop_sequence": None}
        message = {**self._head, **empty, "usage": message_usage(usage)}
        return {"type": "message_start", "message": message}

    def events(self, delta: ChoiceDelta) -> list[Event]:
        """Return the events of the blocks in a delta."""
        parsed, is_call = self._parse(delta)
        events = self._blocks.feed(parsed)
        if delta.finish is None:
            return events
        self._ending = self._stop_fields(delta.finish, is_call)
        return events + self._blocks.end()

    def end(self, usage: Usage) -> list[Event]:
        """Return the last events."""
        counts = message_usage(usage)
        del counts["service_tier"]
        change = {"type": "message_delta", "delta": self._ending, "usage": counts}
        return [change, {"type": "message_stop"}]

    def _stop_fields(self, finish: Finish, is_call: bool) -> Event:
        stopped = finish.stop_reason if isinstance(finish.stop_reason, str) else None
        if finish.reason is FinishReason.LENGTH:
            max_tokens = self.call.max_tokens or 0
            is_full = finish.usage.completion_tokens < max_tokens
            reason = "model_context_window_exceeded" if is_full else "max_tokens"
        elif is_call:
            reason = "tool_use"
        else:
            reason = "end_turn" if stopped is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": stopped}


def message_usage(usage: Usage) -> dict[str, Any]:
    """Return the ``usage`` object; ``input_tokens`` excludes cached prompt tokens."""
    cached = usage.cached_tokens or 0
    return {
        "input_tokens": usage.prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.completion_tokens,
        "service_tier": "standard",
    }
