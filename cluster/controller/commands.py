"""Commands of clients: begins each command and tells when its reply is ready."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.controller.adapters import (
    LOAD_LIMIT_S,
    AdapterLoadCommand,
    Adapters,
    AdapterUnloadCommand,
)
from cluster.controller.cluster import Cluster
from cluster.controller.drain_operation import DrainCommand
from cluster.controller.draining import Draining
from cluster.controller.operations import Operation
from cluster.controller.rebalance_job import RebalanceCommand
from cluster.controller.rebalancing import Rebalancing
from cluster.controller.scale import Scaling
from cluster.controller.scale_operation import ScaleCommand
from cluster.core.codec import Message, from_plain
from cluster.core.errors import RequestError

M = TypeVar("M", bound=Message)
_PLAN_LIMIT_S = 20.0
"""Longest wait of a client for a rebalancing's plan, in seconds; planning may take longer."""
_ADAPTER_LIMIT_S = LOAD_LIMIT_S + 10.0


@dataclass(frozen=True, slots=True)
class BegunCommand:
    """A command that the controller has accepted, and its reply."""

    answer: Callable[[], dict[str, Any]]
    """Function that returns the reply to the client as plain data, or raises ``RequestError``."""
    is_settled: Callable[[], bool] = lambda: True
    """Function that returns whether the reply is ready."""
    limit_s: float = 0.0
    """Longest wait for ``is_settled``, in seconds; then the client gets a reply in any case."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Commands:
    """Passes each command to the part of the controller that carries it out."""

    cluster: Cluster
    draining: Draining
    scaling: Scaling
    rebalancing: Rebalancing
    adapters: Adapters

    def begin(self, kind: str, fields: Mapping[str, Any], now: float) -> BegunCommand:
        """Begin a client's command; an operation with the same request id begins only once.

        ``kind`` and ``fields``: ``drain`` and ``DrainCommand``, ``scale`` and ``ScaleCommand``,
        ``rebalance`` and ``RebalanceCommand``, ``load_adapter`` and ``AdapterLoadCommand``,
        ``unload_adapter`` and ``AdapterUnloadCommand``. Raises ``RequestError``,
        ``UnknownNameError``, ``ModelNotFoundError`` and ``ConflictError``, and then changes
        nothing.
        """

        def read(command: type[M]) -> M:
            return from_plain(fields, command, RequestError)

        match kind:
            case "drain":
                return BegunCommand(self.draining.begin(read(DrainCommand), now).to_dict)
            case "scale":
                return BegunCommand(self.scaling.begin(read(ScaleCommand), now).to_dict)
            case "rebalance":
                operation = self.rebalancing.begin(read(RebalanceCommand), now)
                return BegunCommand(
                    operation.to_dict,
                    lambda: not self.rebalancing.plans.waits(operation.id),
                    _PLAN_LIMIT_S,
                )
            case "load_adapter":
                key = self.adapters.load(read(AdapterLoadCommand), now)
                return BegunCommand(
                    lambda: self.adapters.answer(key),
                    lambda: self.adapters.is_settled(key),
                    _ADAPTER_LIMIT_S,
                )
            case "unload_adapter":
                key = self.adapters.unload(read(AdapterUnloadCommand).name, now)
                return BegunCommand(lambda: {"key": key})
        raise RequestError(f"kind ({kind[:64]!r}) is not a known command", "kind")

    def cancel(self, operation_id: str, now: float) -> Operation:
        """Cancel a running operation and return it.

        Raises ``UnknownNameError``, or ``ConflictError`` if it is too late to cancel the operation.
        """
        operation = self.cluster.operations.find(operation_id)
        match operation.kind:
            case "drain":
                self.draining.cancel(operation, now)
            case "scale":
                self.scaling.cancel(operation, now)
            case _:
                self.rebalancing.cancel(operation, now)
        self.cluster.send_snapshot()  # the next controller must not continue it
        return operation
