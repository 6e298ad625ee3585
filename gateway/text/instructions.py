"""System and developer messages where a chat template does not take them.

Many templates have one system message, at the start, and refuse any other place or leave its text
out; some have none, and most know no ``developer``. Clients send several, and late ones. The text
must reach the model all the same: several at the start become one, and those that have no place
become part of the user's turn beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

SYSTEM, DEVELOPER, USER = "system", "developer", "user"
INSTRUCTING = frozenset({SYSTEM, DEVELOPER})
_BETWEEN = "\n\n"
"""Text between two texts that become one."""

Message = Mapping[str, Any]


def leading_roles(messages: Sequence[Message]) -> tuple[str, ...]:
    """Roles of the instructions at the start of a conversation."""
    return tuple(m["role"] for m in takewhile(_is_instruction, messages))


def late_roles(messages: Sequence[Message]) -> frozenset[str]:
    """Roles of instructions after the start."""
    rest = messages[len(leading_roles(messages)) :]
    return frozenset(m["role"] for m in rest if _is_instruction(m))


def with_one_at_the_start(messages: Sequence[Message]) -> list[Message]:
    """The instructions at the start as one system message."""
    number = len(leading_roles(messages))
    if number == 0:
        return list(messages)
    texts = [m["content"] for m in messages[:number] if m["content"]]
    return [{"role": SYSTEM, "content": _BETWEEN.join(texts)}, *messages[number:]]


def with_late_ones_as_user(messages: Sequence[Message]) -> list[Message]:
    """Instructions after the start as the user's words."""
    number = len(leading_roles(messages))
    return [*messages[:number], *with_all_as_user(messages[number:])]


def with_all_as_user(messages: Sequence[Message]) -> list[Message]:
    """Instructions as the user's words: before those that follow, or else after others."""
    found, waiting = list[Message](), list[str]()
    for message in messages:
        if _is_instruction(message):
            waiting.append(message["content"])
            continue
        if waiting and message.get("role") == USER and isinstance(message.get("content"), str):
            message = {**message, "content": _BETWEEN.join([*waiting, message["content"]])}
        elif waiting:
            _append(found, waiting)
        waiting = []
        found.append(message)
    if waiting:
        _append(found, waiting)
    return found


def _append(messages: list[Message], texts: Sequence[str]) -> None:
    """Add to the user's turn at the end, or as a turn of its own."""
    last = messages[-1] if messages else {}
    if last.get("role") == USER and isinstance(last.get("content"), str):
        messages[-1] = {**last, "content": _BETWEEN.join([last["content"], *texts])}
    else:
        messages.append({"role": USER, "content": _BETWEEN.join(texts)})


def _is_instruction(message: Message) -> bool:
    return message.get("role") in INSTRUCTING and isinstance(message.get("content"), str)
