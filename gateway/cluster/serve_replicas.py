"""Calls to all replicas of the gateway, and the replies of one replica.

A client's request reaches any one replica. That replica collects the data of all replicas:
metrics, addresses and results of aborts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

ReplicaCall = Literal["describe", "metrics", "summary", "samples", "abort", "adapters"]
"""Kinds of calls to a gateway replica. ``summary`` returns the result of ``describe`` with start
time and totals; ``samples`` returns the dashboard samples after a time; ``adapters`` returns the
keys of the adapters that requests may name.
"""


class ServeReplicas(Protocol):
    """Interface that sends a call to all gateway replicas."""

    async def call(self, call: ReplicaCall, *details: Any) -> dict[str, Any]:
        """Return replies by replica name, this replica's first, without late and failed ones."""


class ReplicaHandlers:
    """Makes the replies of one gateway replica; implements ``ServeReplicas`` for a single replica.

    Args:
        name: name of the replica.
        handlers: for each kind of call, a function that returns plain data.
    """

    def __init__(self, name: str, handlers: Mapping[ReplicaCall, Callable[..., Any]]) -> None:
        self._name = name
        self._handlers = handlers

    def handle(self, call: ReplicaCall, *details: Any) -> tuple[str, Any]:
        return self._name, self._handlers[call](*details)

    async def call(self, call: ReplicaCall, *details: Any) -> dict[str, Any]:
        return dict([self.handle(call, *details)])


def own_first(own: tuple[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return replies by replica name with ``own`` first. ``others`` may contain ``own``, too."""
    return {own[0]: own[1], **{name: found for name, found in others.items() if name != own[0]}}
