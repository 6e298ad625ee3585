"""Ids of tool calls, in the format that a model's chat template requires.

Templates of Mistral reject ids other than nine letters and digits. Kimi K2 writes
``functions.NAME:NUMBER``, where numbers count the calls of the whole conversation, and expects the
same text as the id of the result. Other templates do not show ids, or accept any id.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string
import uuid
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from gateway.core.tool_use import ToolCallFormat

_LETTERS = string.ascii_letters + string.digits
_MISTRAL_CHARS = 9
_MISTRAL = re.compile(rf"[A-Za-z0-9]{{{_MISTRAL_CHARS}}}")
_KIMI = re.compile(r"functions\.[A-Za-z0-9_.-]+:([0-9]{1,9})")
_REQUIRED_PATTERNS = {ToolCallFormat.MISTRAL: _MISTRAL, ToolCallFormat.KIMI: _KIMI}


class CallIdGenerator:
    """Creates the ids of tool calls, which are unique in one conversation.

    Args:
        form: format of the calls; None and most formats allow any ids.
        used: existing ids in the conversation.
    """

    def __init__(self, form: ToolCallFormat | None = None, used: Iterable[str] = ()) -> None:
        self._form = form
        self._used: set[str] = set()
        self._next_number = 0
        self._num_derived: dict[str, int] = {}
        for one in used:
            self._register(one)

    def new(self, name: str, number: str | None = None) -> str:
        """Create the id of the next call.

        Args:
            name: name of the function.
            number: number that the model wrote (Kimi); used unless another call has it.
        """
        if self._form is ToolCallFormat.KIMI:
            return self._numbered_id(name, number)
        while (call_id := self._random_id()) in self._used:
            pass
        self._register(call_id)
        return call_id

    def fit(self, client_id: str | None, name: str) -> str:
        """Return an id for an earlier call that the model's chat template accepts.

        The result is ``client_id`` if the template accepts this id and no other call has it.
        """
        pattern = _REQUIRED_PATTERNS.get(self._form) if self._form is not None else None
        is_free = client_id is not None and client_id not in self._used
        if client_id is not None and is_free and (pattern is None or pattern.fullmatch(client_id)):
            call_id = client_id
        elif self._form is ToolCallFormat.KIMI:
            return self._numbered_id(name, None)
        else:
            call_id = self._derived_id(client_id or "")
        self._register(call_id)
        return call_id

    def _register(self, call_id: str) -> None:
        """Record that a call has the id ``call_id``."""
        self._used.add(call_id)
        if written := _KIMI.fullmatch(call_id):
            self._next_number = max(self._next_number, int(written[1]) + 1)

    def _random_id(self) -> str:
        if self._form is ToolCallFormat.MISTRAL:
            return "".join(secrets.choice(_LETTERS) for _ in range(_MISTRAL_CHARS))
        return f"call_{uuid.uuid4().hex[:24]}"

    def _derived_id(self, client_id: str) -> str:
        """Return nine letters and digits that no other call has, derived from ``client_id``."""
        while True:
            attempt = self._num_derived.get(client_id, 0)
            self._num_derived[client_id] = attempt + 1
            digest = hashlib.sha256(
                f"{attempt}:{client_id}".encode("utf-8", "surrogatepass")
            ).digest()
            call_id = "".join(_LETTERS[byte % len(_LETTERS)] for byte in digest[:_MISTRAL_CHARS])
            if call_id not in self._used:
                return call_id

    def _numbered_id(self, name: str, number: str | None) -> str:
        call_id = f"functions.{name}:{number}"
        if number is None or call_id in self._used:
            while (call_id := f"functions.{name}:{self._next_number}") in self._used:
                self._next_number += 1  # after a number with too many digits to be read
        self._register(call_id)
        return call_id


def conversation_call_ids(
    messages: Sequence[Mapping[str, Any]], form: ToolCallFormat | None
) -> Collection[str]:
    """Return the ids of the tool calls in a conversation, as the chat template gets them."""
    fitted = fit_call_ids(messages, form)
    named = [call.get("id") for message in fitted for call in _calls(message)]
    return {one for one in named if isinstance(one, str)}


def fit_call_ids(
    messages: Sequence[Mapping[str, Any]], form: ToolCallFormat | None
) -> Sequence[Mapping[str, Any]]:
    """Replace ids of tool calls that the chat template rejects, in calls and results.

    If several calls have the same id, results are assigned to them in order.
    """
    if form not in _REQUIRED_PATTERNS:
        return messages
    ids = CallIdGenerator(form)
    waiting: dict[str | None, deque[str]] = {}
    fitted: list[Mapping[str, Any]] = []
    for message in messages:
        if calls := _calls(message):
            renamed = []
            for call in calls:
                client_id = call.get("id")
                new = ids.fit(client_id, str((call.get("function") or {}).get("name")))
                waiting.setdefault(client_id, deque()).append(new)
                renamed.append({**call, "id": new})
            message = {**message, "tool_calls": renamed}
        elif message.get("role") == "tool":
            call_ids = waiting.get(message.get("tool_call_id"))
            if call_ids:
                new = call_ids.popleft() if len(call_ids) > 1 else call_ids[0]
                message = {**message, "tool_call_id": new}
        fitted.append(message)
    return fitted


def _calls(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, (list, tuple)) else ()
