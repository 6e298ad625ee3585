"""Reasoning between ``<think>`` and ``</think>`` before the answer of a model."""

from __future__ import annotations

from enum import Enum, auto

BEGIN, END = "<think>", "</think>"


class Thinking(Enum):
    """Where the reasoning begins, if it is not already complete in the prompt."""

    OPEN = auto()
    """The prompt has opened the reasoning, so the output begins within it."""
    POSSIBLE = auto()
    """The output may open a reasoning."""


def thinking_after(prompt: str, open_message: str | None = None) -> Thinking | None:
    """Return where the reasoning begins; None if the output begins with the answer.

    Args:
        prompt: the prompt or its end, rendered by a template that supports reasoning.
        open_message: the message that the output continues; None if there is none.
    """
    if open_message is not None:
        return Thinking.OPEN if open_message.rfind(BEGIN) > open_message.rfind(END) else None
    end = prompt.rstrip()
    if end.endswith(END):
        return None
    return Thinking.OPEN if end.endswith(BEGIN) else Thinking.POSSIBLE
