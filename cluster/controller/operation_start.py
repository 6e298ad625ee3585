"""Starts an operation of any kind, with the same checks in the same order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from cluster.controller.cluster import Cluster
from cluster.controller.operations import Operation, OperationCommand
from cluster.core.errors import ConflictError

C = TypeVar("C", bound=OperationCommand, contravariant=True)


class OperationKind(Protocol[C]):
    """Interface through which ``start_operation`` checks and begins one kind of operation.

    The methods change nothing.
    """

    def target(self, command: C) -> str:
        """Describe the target of the operation, such as the workers to drain.

        Raises an error for an invalid command.
        """

    def prepare(self, command: C) -> Callable[[Operation, float], None]:
        """Return the function that runs the first step; arguments: operation, monotonic time.

        Raises ``ConflictError`` if the operation cannot begin now.
        """


def start_operation(command: C, kind: OperationKind[C], cluster: Cluster, now: float) -> Operation:
    """Start an operation, or return the operation that a command with the same id has started.

    Raises ``ConflictError`` and the errors of ``kind``; the cluster is unchanged in that case.
    """
    operations = cluster.operations
    repeated = operations.find_repeated(command, cluster.placement.epoch)
    if repeated is not None:
        return repeated
    target = kind.target(command)
    operations.check_free()
    if not cluster.can_accept_operations:
        raise ConflictError("the cluster is starting or ending")
    first_step = kind.prepare(command)
    operation = operations.begin(command, target, now)
    first_step(operation, now)
    return operation
