"""Client that starts operations of a cluster, through its admin port or through Ray.

The admin port usually listens on loopback only. On other hosts a command joins the cluster's Ray
and calls the controller: every user of that Ray has full control of the cluster anyway.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.cli.terminal.client import Client, require_full_status, validate_url
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.config.gateway import is_loopback
from cluster.core.codec import from_plain
from cluster.core.errors import ExpertMeshError, NotReadyError
from cluster.core.fleets import CONTROLLER_NAME, NAMESPACE, namespace_of
from cluster.core.model_table import ModelTable

_CALL_LIMIT_S = 10.0


class AdminClient:
    """Starts and reads operations of one cluster, in the format of the admin port's documents.

    Raises ``CommandError``.
    """

    def __init__(self, admin: Client | None, model: str | None = None) -> None:
        """``admin``: client of the admin port; None: call the controller in the joined Ray.

        ``model``: name of the model to change; None: the first model.
        """
        self._admin = admin
        self._namespace = NAMESPACE if admin is not None else _find_fleet(model)

    def drain(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Start a drain and return the operation; ``fields`` as in ``DrainWorkerRequest``."""
        return self._begin("drain", _with_limit(fields), fields)

    def scale(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Start a scaling and return the operation; ``fields`` as in ``ScaleRequest``."""
        return self._begin("scale", _with_limit(fields), fields)

    def rebalance(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Start a rebalancing and return the operation; ``fields`` as in ``RebalanceRequest``."""
        return self._begin("rebalance", dict(fields), fields)

    def cancel(self, operation_id: str) -> dict[str, Any]:
        path = f"operations/{_quoted(operation_id)}/cancel"
        return self._call("cancel_operation", operation_id, path, {})

    def operation(self, operation_id: str) -> dict[str, Any]:
        return self._call("operation", operation_id, f"operations/{_quoted(operation_id)}")

    def operations(self) -> list[dict[str, Any]]:
        """Return the recorded operations (drains, scalings, rebalancings), newest last."""
        if self._admin is None:
            return list(map(_document, self._ask("operations")))
        found: list[dict[str, Any]] = self._admin.get("/admin/v1/operations")["operations"]
        return found

    def log(self, process: str, after: int) -> tuple[int, list[str]]:
        """Return how many lines a process has logged, and the kept lines after line ``after``."""
        if self._admin is None:
            found = self._ask("log", process, after)
        else:
            query = urllib.parse.urlencode({"process": process, "after": after})
            found = self._admin.get(f"/admin/v1/log?{query}")
        return int(found["number"]), list(found["lines"])

    def _begin(
        self, kind: str, command: dict[str, Any], fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Start an operation through the controller or the admin port.

        ``command``: content of the request in the controller's format; ``fields``: in that of the
        admin port.
        """
        if self._admin is None:
            return _document(self._ask("begin", kind, command))
        return self._call("begin", command, kind, fields)

    def _call(
        self, method: str, argument: Any, path: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Call a method of the controller, or the admin port: POST with a body, else GET."""
        if self._admin is None:
            return _document(self._ask(method, argument))
        url = f"/admin/v1/{path}"
        answer: dict[str, Any]
        answer = self._admin.get(url) if body is None else self._admin.post(url, dict(body))
        return answer

    def _ask(self, method: str, *arguments: Any) -> Any:
        return _ask(method, *arguments, namespace=self._namespace)


def _with_limit(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Rename ``deadline_s`` to ``limit_s``, which is the controller's name for the field."""
    return {"limit_s" if k == "deadline_s" else k: v for k, v in fields.items()}


def _quoted(operation_id: str) -> str:
    return urllib.parse.quote(operation_id, safe="")


@contextlib.contextmanager
def make_admin_client(args: argparse.Namespace) -> Iterator[AdminClient]:
    """Yield a client that uses Ray (``--address``), or else the admin port or ``RAY_ADDRESS``.

    Raises ``CommandError``.
    """
    address = args.address
    if not address:
        admin = find_admin(args)
        if admin is not None:
            yield AdminClient(admin)
            return
        address = os.environ["RAY_ADDRESS"]
    with _joined(address):
        yield AdminClient(None, args.model)


def find_admin(args: argparse.Namespace, gateway: str | None = None) -> Client | None:
    """Make a client of the admin port; None if this host can reach only the cluster's Ray.

    ``gateway``: name of the gateway to use if there are several; ``--admin-url`` takes priority.
    """
    given = args.admin_url or os.environ.get("EXPERTMESH_ADMIN_URL")
    if given:
        origin = "--admin-url" if args.admin_url else "EXPERTMESH_ADMIN_URL"
        return Client(args, validate_url(str(given), origin))
    through_ray = bool(os.environ.get("RAY_ADDRESS"))
    try:
        client = Client(args)
        status = client.get("/cluster/v1/status")
    except CommandError as err:
        if through_ray and err.code in (ExitCode.UNREACHABLE, ExitCode.NOT_READY):
            return None
        raise
    gateways = status.get("gateway") or []
    found = [g for g in gateways if gateway in (None, g.get("name"))]
    if gateways and not found:
        names = ", ".join(str(g.get("name")) for g in gateways)
        raise CommandError(ExitCode.REFUSED, f"there is no {gateway}, but {names}")
    address = found[0].get("admin_http") if found else None
    if found and "admin_port" in found[0]:  # shown to clients with a key for the admin port
        address = f"127.0.0.1:{found[0]['admin_port']}"
    if not address:
        require_full_status(status, "the address of its admin port")
        raise CommandError(ExitCode.REFUSED, "the cluster has no admin port")
    is_here, is_local = (
        is_loopback(urllib.parse.urlsplit(url).hostname or "")
        for url in (client.url, f"//{address}")
    )
    if is_local and not is_here and through_ray:
        return None
    scheme = urllib.parse.urlsplit(client.url).scheme
    return Client(args, f"{scheme}://{address}")


def _document(found: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the controller's data of an operation to the admin port's format."""
    return {**{k: v for k, v in found.items() if k != "result"}, found["kind"]: found["result"]}


def _find_fleet(model: str | None) -> str:
    """Return the Ray namespace of a model's active revision, in the joined Ray; None: the first.

    Raises ``CommandError``.
    """
    from cluster.launch.models_actor import ask_models_actor

    try:
        table = from_plain(ask_models_actor("table", limit_s=_CALL_LIMIT_S), ModelTable)
    except NotReadyError as err:
        if not isinstance(err.__cause__, ValueError):  # the actor exists, but does not answer
            raise CommandError(ExitCode.NOT_READY, str(err)) from err
        return NAMESPACE if model is None else _find_starting_fleet(model)
    for entry in table.models:
        if model in (None, entry.name) and entry.active:
            return namespace_of(entry.find(entry.active).fleet)
    raise _not_served(model, [entry.name for entry in table.models])


def _find_starting_fleet(model: str) -> str:
    """Return the Ray namespace of a model by its controller. Raises ``CommandError``."""
    from cluster.actors.ray_tools import live_actors

    namespaces = [space for space, name in live_actors() if name == CONTROLLER_NAME]
    names = []
    for namespace in namespaces:
        config = _ask("origin", namespace=namespace)["config"] or {"model": {}}
        names.append(config["model"].get("served_model_name"))
        if names[-1] == model:
            return namespace
    raise _not_served(model, [str(name) for name in names if name is not None])


def _not_served(model: str | None, names: Sequence[str]) -> CommandError:
    served = ", ".join(names) or "none"
    return CommandError(ExitCode.REFUSED, f"the model {model} is not served; served: {served}")


def _ask(method: str, *arguments: Any, namespace: str) -> Any:
    """Call a controller and return its reply. Raises ``CommandError``."""
    from cluster.actors.controller_client import ask_controller

    try:
        return ask_controller(method, *arguments, limit_s=_CALL_LIMIT_S, namespace=namespace)
    except NotReadyError as err:
        raise CommandError(ExitCode.NOT_READY, str(err)) from err
    except ExpertMeshError as err:
        raise CommandError(ExitCode.REFUSED, str(err)) from err


@contextlib.contextmanager
def _joined(address: str) -> Iterator[None]:
    """Make this process a driver of a Ray cluster. Raises ``CommandError``."""
    from cluster.launch import local_ray

    for name, value in local_ray.common_environment().items():
        os.environ.setdefault(name, value)
    import ray

    try:
        local_ray.join_ray(address)
    except ConnectionError as err:
        raise CommandError(ExitCode.UNREACHABLE, f"no Ray at {address}: {err}") from err
    try:
        yield
    finally:
        ray.shutdown()
