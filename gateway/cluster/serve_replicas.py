"""Questions to all serve replicas of the gateway, and the answers of one of them.

Behind one route a client reaches any replica. That replica collects what concerns
the whole gateway: metrics, addresses, a request that must end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

Question = Literal["describe", "metrics", "summary", "samples", "abort", "adapters"]
"""What a replica is asked for; ``summary`` asks for what ``describe`` does, start and totals,
``samples`` for those of its ``SampleRing`` after a time, ``adapters`` for the keys of the
adapters that requests may name.
"""


class ServeReplicas(Protocol):
    """How a replica reaches all of them."""

    async def ask(self, question: Question, *details: Any) -> dict[str, Any]:
        """Answers by replica, this one's first; those that answer too late are left out."""


class ReplicaAnswers:
    """The answers of one replica; ``ServeReplicas`` of a gateway that has no other.

    Args:
        name: of the replica.
        handlers: a function for each question; what it returns is plain data.
    """

    def __init__(self, name: str, handlers: Mapping[Question, Callable[..., Any]]) -> None:
        self._name = name
        self._handlers = handlers

    def answer(self, question: Question, *details: Any) -> tuple[str, Any]:
        return self._name, self._handlers[question](*details)

    async def ask(self, question: Question, *details: Any) -> dict[str, Any]:
        return dict([self.answer(question, *details)])


def own_first(own: tuple[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Answers by replica, ``own`` in front; it may be among the others, too."""
    return {own[0]: own[1], **{name: found for name, found in others.items() if name != own[0]}}
