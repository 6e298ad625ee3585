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
_TOOL = "tool"
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


def with_all_at_the_start(messages: Sequence[Message]) -> list[Message]:
    """All instructions as one system message, wherever they are."""
    instructions = [m for m in messages if _is_instruction(m)]
    rest = [m for m in messages if not _is_instruction(m)]
    return with_one_at_the_start([*instructions, *rest])


def with_late_ones_as_user(messages: Sequence[Message]) -> list[Message]:
    """Instructions after the start as the user's words."""
    number = len(leading_roles(messages))
    return [*messages[:number], *with_all_as_user(messages[number:])]


def with_all_as_user(messages: Sequence[Message]) -> list[Message]:
    """Instructions as the user's words: before those that follow, or else after others.

    Turns of the user on both sides become one, since some templates take no two. Results of tools
    stay next to their calls.
    """
    turns, waiting = _Turns(), list[str]()
    for message in messages:
        if _is_instruction(message):
            waiting += filter(None, [message["content"]])
        elif waiting and message.get("role") == _TOOL:
            turns.add(message)
        elif waiting and _is_text_of_user(message):
            turns.say([*waiting, message["content"]], message)
            waiting = []
        else:
            turns.say(waiting)
            turns.add(message)
            waiting = []
    turns.say(waiting)
    return turns.finish()


class _Turns:
    """Messages; texts of the user that become one are joined once, however many they are."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._texts: list[list[str] | None] = []
        """Of each message; None where it stays as it is."""

    def add(self, message: Message) -> None:
        self._messages.append(message)
        self._texts.append([message["content"]] if _is_text_of_user(message) else None)

    def say(self, texts: Sequence[str], message: Message | None = None) -> None:
        """Add to the user's turn at the end, or else as a turn of its own, like ``message``."""
        if not texts:
            return
        if self._texts and (last := self._texts[-1]) is not None:
            last += texts
        else:
            self._messages.append(message or {"role": USER})
            self._texts.append(list(texts))

    def finish(self) -> list[Message]:
        pairs = zip(self._messages, self._texts, strict=True)
        return [m if own is None else {**m, "content": _BETWEEN.join(own)} for m, own in pairs]


def _is_text_of_user(message: Message) -> bool:
    return message.get("role") == USER and isinstance(message.get("content"), str)


def _is_instruction(message: Message) -> bool:
    return message.get("role") in INSTRUCTING and isinstance(message.get("content"), str)


def shows_instructions(text: str, messages: Sequence[Message]) -> bool:
    """Whether a prompt has the instructions of a conversation, in their order."""
    place = 0
    for message in filter(_is_instruction, messages):
        words = message["content"].strip()
        place = text.find(words, place)
        if place < 0:
            return False
        place += len(words)
    return True
