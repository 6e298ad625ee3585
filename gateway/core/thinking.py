"""Reasoning between ``<think>`` and ``</think>`` before the answer of a model."""

from __future__ import annotations

from enum import Enum, auto

BEGIN, END = "<think>", "</think>"


class Thinking(Enum):
    """Where the reasoning begins; not used if the prompt has already ended it."""

    OPEN = auto()
    """In the prompt: the output begins within the reasoning."""
    POSSIBLE = auto()
    """In the output, if at all."""


def thinking_after(prompt: str, open_message: str | None = None) -> Thinking | None:
    """Where the reasoning of the output begins; None if the output begins with the answer.

    Args:
        prompt: text of the prompt, or its end, from a template that knows reasoning.
        open_message: message that the output continues, if any.
    """
    if open_message is not None:
        return Thinking.OPEN if open_message.rfind(BEGIN) > open_message.rfind(END) else None
    end = prompt.rstrip()
    if end.endswith(END):
        return None
    return Thinking.OPEN if end.endswith(BEGIN) else Thinking.POSSIBLE
