"""Calls to all serve replicas of the gateway, and the replies of one replica.

All replicas share one route, so that a client reaches any of them. That replica collects the data
of the whole gateway: metrics, addresses, the result of aborting a request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

ReplicaCall = Literal["describe", "metrics", "summary", "samples", "abort", "adapters"]
"""Kinds of calls to a replica; ``summary`` returns what ``describe`` does, start and totals,
``samples`` the samples of its ``SampleRing`` after a time, ``adapters`` the keys of the adapters
that requests may name.
"""


class ServeReplicas(Protocol):
    """Calls all replicas on behalf of one."""

    async def call(self, call: ReplicaCall, *details: Any) -> dict[str, Any]:
        """Replies by replica, this one's first; replicas that reply too late are left out."""


class ReplicaHandlers:
    """Replies of one replica; also the ``ServeReplicas`` of a gateway with a single replica.

    Args:
        name: name of the replica.
        handlers: a function for each call that returns plain data.
    """

    def __init__(self, name: str, handlers: Mapping[ReplicaCall, Callable[..., Any]]) -> None:
        self._name = name
        self._handlers = handlers

    def handle(self, call: ReplicaCall, *details: Any) -> tuple[str, Any]:
        return self._name, self._handlers[call](*details)

    async def call(self, call: ReplicaCall, *details: Any) -> dict[str, Any]:
        return dict([self.handle(call, *details)])


def own_first(own: tuple[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Replies by replica with ``own`` first; ``others`` may contain it, too."""
    return {own[0]: own[1], **{name: found for name, found in others.items() if name != own[0]}}
