"""How orders that change a cluster get there: its admin port, or Ray.

The admin port listens on the loopback interface of a gateway's host. From other hosts the order
goes to the controller itself, as a Ray driver: who may use that Ray may do anything anyway.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

from cluster.cli.client import Client
from cluster.cli.exit_codes import CommandError, ExitCode
from cluster.errors import ExpertMeshError, NotReadyError
from cluster.gateway_config import is_loopback

_CALL_LIMIT_S = 10.0


class Orders(Protocol):
    """A way to a cluster. Every order begins an operation, and returns it. ``CommandError``s."""

    def drain(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of ``DrainWorkerRequest``."""

    def rebalance(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of ``RebalanceRequest``."""

    def scale(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of ``ScaleRequest``."""

    def operation(self, operation_id: str) -> dict[str, Any]:
        """How far an operation is."""


def add_address_option(parser: argparse.ArgumentParser) -> None:
    """``--address``, for commands that can go through Ray."""
    parser.add_argument(
        "--address",
        metavar="A",
        help="go through this Ray (auto: the one on this host), not through the admin port",
    )


@contextlib.contextmanager
def orders_for(args: argparse.Namespace) -> Iterator[Orders]:
    """The way that ``args`` ask for, or the one there is. Raises ``CommandError``."""
    address = args.address
    if not address:
        admin = find_admin(args)
        if admin is not None:
            yield AdminOrders(admin)
            return
        address = os.environ["RAY_ADDRESS"]
    with _joined(address):
        yield RayOrders()


def find_admin(args: argparse.Namespace) -> Client | None:
    """The admin port, where it can be reached from here; None where there is a way through Ray."""
    calls = argparse.Namespace(**{**vars(args), "timeout": None})  # it is the operation's limit
    given = args.admin_url or os.environ.get("EXPERTMESH_ADMIN_URL")
    if given:
        return Client(calls, str(given).rstrip("/"))
    through_ray = bool(os.environ.get("RAY_ADDRESS"))
    try:
        client = Client(calls)
        gateways = client.get("/cluster/v1/status").get("gateway") or [{}]
    except CommandError as err:
        if through_ray and err.code in (ExitCode.UNREACHABLE, ExitCode.NOT_READY):
            return None
        raise
    address = gateways[0].get("admin_http")
    if not address:
        raise CommandError(ExitCode.REFUSED, "the cluster has no admin port")
    is_here, is_local = (
        is_loopback(urlsplit(url).hostname or "") for url in (client.url, f"//{address}")
    )
    if is_local and not is_here and through_ray:
        return None
    scheme = urlsplit(client.url).scheme
    return Client(calls, f"{scheme}://{address}")


class AdminOrders:
    """Through the admin service of a gateway."""

    def __init__(self, admin: Client) -> None:
        self._admin = admin

    def drain(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Orders``."""
        return self._post("drain", order)

    def rebalance(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Orders``."""
        return self._post("rebalance", order)

    def scale(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Orders``."""
        return self._post("scale", order)

    def operation(self, operation_id: str) -> dict[str, Any]:
        """See ``Orders``."""
        answer: dict[str, Any] = self._admin.get(f"/admin/v1/operations/{operation_id}")
        return answer

    def _post(self, name: str, order: Mapping[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = self._admin.post(f"/admin/v1/{name}", dict(order))
        return answer


class RayOrders:
    """Calls of the controller in the Ray that this process has joined."""

    def drain(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Orders``."""
        fields = {k: v for k, v in order.items() if k != "deadline_s"}
        return _ask("drain", {**fields, "limit_s": order["deadline_s"]})

    def rebalance(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Orders``."""
        return _ask("rebalance", dict(order))

    def scale(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Orders``."""
        raise CommandError(ExitCode.REFUSED, "Scale is not built yet")

    def operation(self, operation_id: str) -> dict[str, Any]:
        """See ``Orders``."""
        return _ask("operation", operation_id)


def _ask(method: str, argument: Any) -> dict[str, Any]:
    """An operation as the admin port would tell it. Raises ``CommandError``."""
    from cluster.cluster_calls import ask_controller

    try:
        found = ask_controller(method, argument, limit_s=_CALL_LIMIT_S)
    except NotReadyError as err:
        raise CommandError(ExitCode.NOT_READY, str(err)) from err
    except ExpertMeshError as err:
        raise CommandError(ExitCode.REFUSED, str(err)) from err
    plain = {k: v for k, v in found.items() if k != "result"}
    return {"schema": 1, **plain, found["kind"]: found["result"]}


@contextlib.contextmanager
def _joined(address: str) -> Iterator[None]:
    """This process as a driver of a Ray. Raises ``CommandError``."""
    from cluster import local_ray

    for name, value in local_ray.common_environment().items():
        os.environ.setdefault(name, value)
    import ray

    try:
        local_ray.join(address)
    except (ConnectionError, RuntimeError, ValueError) as err:
        words = str(err).strip().splitlines() or [type(err).__name__]
        raise CommandError(ExitCode.UNREACHABLE, f"no Ray at {address}: {words[0]}") from err
    try:
        yield
    finally:
        ray.shutdown()
