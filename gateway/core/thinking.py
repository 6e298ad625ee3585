"""Reasoning that models write between ``<think>`` and ``</think>`` before an answer."""

from __future__ import annotations

from enum import Enum, auto

BEGIN, END = "<think>", "</think>"


class Thinking(Enum):
    """Where an answer's reasoning begins. An answer whose prompt has ended it has none of these."""

    OPEN = auto()
    """In the prompt: the answer begins within it."""
    POSSIBLE = auto()
    """In the answer, if at all."""


def thinking_after(prompt: str, open_message: str | None = None) -> Thinking | None:
    """What the answer to a prompt begins with; None: its words for the user.

    Args:
        prompt: rendered by a template that knows reasoning, or its last tokens as text.
        open_message: the message that the answer goes on with, if there is one.
    """
    if open_message is not None:
        return Thinking.OPEN if open_message.rfind(BEGIN) > open_message.rfind(END) else None
    end = prompt.rstrip()
    if end.endswith(END):
        return None
    return Thinking.OPEN if end.endswith(BEGIN) else Thinking.POSSIBLE
