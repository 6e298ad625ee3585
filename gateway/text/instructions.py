"""Moves system and developer messages that a chat template does not accept.

Many templates accept one system message at the start and reject or skip others; some accept none,
and most do not know the role ``developer``. Clients send several such messages, also late in the
conversation. Therefore instructions at the start are merged, and instructions that the template
does not accept become part of an adjacent user message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

SYSTEM, DEVELOPER, USER = "system", "developer", "user"
_TOOL = "tool"
INSTRUCTION_ROLES = frozenset({SYSTEM, DEVELOPER})
_SEPARATOR = "\n\n"
"""Separator between the texts of messages that are merged into one message."""

Message = Mapping[str, Any]


def leading_roles(messages: Sequence[Message]) -> tuple[str, ...]:
    """Return the roles of the system and developer messages at the start of a conversation."""
    return tuple(m["role"] for m in takewhile(_is_instruction, messages))


def late_roles(messages: Sequence[Message]) -> frozenset[str]:
    """Return the roles of system and developer messages after a message of another role."""
    rest = messages[len(leading_roles(messages)) :]
    return frozenset(m["role"] for m in rest if _is_instruction(m))


def merge_leading_instructions(messages: Sequence[Message]) -> list[Message]:
    """Merge the system and developer messages at the start into one system message."""
    number = len(leading_roles(messages))
    if number == 0:
        return list(messages)
    texts = [m["content"] for m in messages[:number] if m["content"]]
    return [{"role": SYSTEM, "content": _SEPARATOR.join(texts)}, *messages[number:]]


def merge_all_instructions(messages: Sequence[Message]) -> list[Message]:
    """Merge all system and developer messages into one system message at the start."""
    instructions = [m for m in messages if _is_instruction(m)]
    rest = [m for m in messages if not _is_instruction(m)]
    return merge_leading_instructions([*instructions, *rest])


def late_instructions_to_user(messages: Sequence[Message]) -> list[Message]:
    """Convert system and developer messages that are not at the start into user text."""
    number = len(leading_roles(messages))
    return [*messages[:number], *instructions_to_user(messages[number:])]


def instructions_to_user(messages: Sequence[Message]) -> list[Message]:
    """Convert system and developer messages to user text, joined with adjacent user messages.

    Adjacent user messages are merged, since some templates reject consecutive ones. Tool results
    stay next to their calls.
    """
    turns, waiting = _MessageMerger(), list[str]()
    for message in messages:
        if _is_instruction(message):
            waiting += filter(None, [message["content"]])
        elif waiting and message.get("role") == _TOOL:
            turns.add(message)
        elif waiting and _is_text_of_user(message):
            turns.add_user_text([*waiting, message["content"]], message)
            waiting = []
        else:
            turns.add_user_text(waiting)
            turns.add(message)
            waiting = []
    turns.add_user_text(waiting)
    return turns.finish()


class _MessageMerger:
    """Collects messages and merges consecutive user texts, which ``finish`` joins."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._texts: list[list[str] | None] = []
        """User texts to join for each message; None for messages that are not changed."""

    def add(self, message: Message) -> None:
        self._messages.append(message)
        self._texts.append([message["content"]] if _is_text_of_user(message) else None)

    def add_user_text(self, texts: Sequence[str], message: Message | None = None) -> None:
        """Append texts to the last message if it has user text, else add a user message with them.

        The added message is a copy of ``message`` with ``texts`` as content.
        """
        if not texts:
            return
        if self._texts and (last := self._texts[-1]) is not None:
            last += texts
        else:
            self._messages.append(message or {"role": USER})
            self._texts.append(list(texts))

    def finish(self) -> list[Message]:
        pairs = zip(self._messages, self._texts, strict=True)
        return [
            m if texts is None else {**m, "content": _SEPARATOR.join(texts)} for m, texts in pairs
        ]


def _is_text_of_user(message: Message) -> bool:
    return message.get("role") == USER and isinstance(message.get("content"), str)


def _is_instruction(message: Message) -> bool:
    return message.get("role") in INSTRUCTION_ROLES and isinstance(message.get("content"), str)


def contains_instructions(text: str, messages: Sequence[Message]) -> bool:
    """Whether a prompt contains the system and developer messages of a conversation in order."""
    position = 0
    for message in filter(_is_instruction, messages):
        text_part = message["content"].strip()
        position = text.find(text_part, position)
        if position < 0:
            return False
        position += len(text_part)
    return True
