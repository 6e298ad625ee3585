"""What all replicas of the gateway are asked at once, and what one of them answers.

Behind one route a client meets any replica. What concerns the whole gateway (its metrics, its
addresses, a request that is to end) is collected by the one that was met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from gateway.core import Gateway

Question = Literal["describe", "metrics", "abort"]
"""The methods of ``ReplicaAnswers``."""


class Peers(Protocol):
    """How a replica reaches all of them."""

    async def ask(self, question: Question, *details: Any) -> dict[str, Any]:
        """The answers by replica, of this one first. Who does not answer in time is left out."""


class ReplicaAnswers:
    """The answers of one replica."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def answer(self, question: Question, *details: Any) -> tuple[str, Any]:
        """This replica's name, and its answer: plain data."""
        known: dict[str, Callable[..., Any]] = {
            "describe": self._describe,
            "metrics": self._metrics,
            "abort": self._abort,
        }
        return self._gateway.name, known[question](*details)

    def _describe(self) -> dict[str, Any]:
        return self._gateway.describe()

    def _metrics(self) -> list[dict[str, Any]]:
        return self._gateway.metrics.own_families()

    def _abort(self, names: Iterable[str]) -> list[str]:
        return self._gateway.running.abort(names)


class NoPeers:
    """For a replica that is the only one."""

    def __init__(self, answers: ReplicaAnswers) -> None:
        self._answers = answers

    async def ask(self, question: Question, *details: Any) -> dict[str, Any]:
        """See ``Peers``."""
        return dict([self._answers.answer(question, *details)])


def own_first(own: tuple[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Answers by replica, ``own`` in front; it may be among the others, too."""
    return {own[0]: own[1], **{name: found for name, found in others.items() if name != own[0]}}
