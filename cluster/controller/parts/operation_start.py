"""The start of an operation: one order of checks for every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from cluster.controller.parts.cluster import Cluster
from cluster.controller.parts.operations import Operation, OperationCommand
from cluster.core.errors import ConflictError

C = TypeVar("C", bound=OperationCommand, contravariant=True)


class OperationKind(Protocol[C]):
    """One kind of operation, as its start needs it. Both methods change nothing."""

    def target(self, command: C) -> str:
        """The target of the operation, for people. Raises an error for an invalid command."""

    def prepare(self, command: C) -> Callable[[Operation, float], None]:
        """The function that carries out the first step of the operation, given the time.

        Raises ``ConflictError`` if it cannot begin now.
        """


def start_operation(command: C, kind: OperationKind[C], cluster: Cluster, now: float) -> Operation:
    """Start an operation, or find the one that the same command started.

    Raises ``ConflictError`` and the errors of ``kind``; nothing has changed then.
    """
    operations = cluster.operations
    repeated = operations.find_repeated(command, cluster.placement.epoch)
    if repeated is not None:
        return repeated
    target = kind.target(command)
    operations.check_free()
    if not cluster.takes_orders:
        raise ConflictError("the cluster is starting or ending")
    first_step = kind.prepare(command)
    operation = operations.begin(command, target, now)
    first_step(operation, now)
    return operation
