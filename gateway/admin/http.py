"""The admin service over HTTP: the messages of ``admin.proto`` as JSON, below ``/admin/v1``."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cluster.core.errors import PermissionDeniedError, RequestError
from gateway.admin.calls import SERVICE
from gateway.admin.revision_calls import NAMES as REVISION_CALLS
from gateway.admin.revision_calls import AdminCallsByModel
from gateway.calls.gateway import Gateway
from gateway.dashboard import http as dashboard
from gateway.http.api import route_error
from gateway.http.json_output import dump_json
from gateway.http.middleware import UNAUTHENTICATED_PATHS, HttpMiddleware
from gateway.http.request_body import read_json
from gateway.listener.http_listener import HttpListener

ROUTES = (
    ("POST", "/admin/v1/drain", "DrainWorker"),
    ("POST", "/admin/v1/gateway/drain", "DrainGateway"),
    ("POST", "/admin/v1/rebalance", "Rebalance"),
    ("POST", "/admin/v1/scale", "Scale"),
    ("POST", "/admin/v1/requests/abort", "AbortRequests"),
    ("POST", "/v1/load_lora_adapter", "LoadLoraAdapter"),
    ("POST", "/v1/unload_lora_adapter", "UnloadLoraAdapter"),
    ("GET", "/admin/v1/lora_adapters", "ListLoraAdapters"),
    ("GET", "/admin/v1/models", "ListRevisions"),
    ("POST", "/admin/v1/models/load", "LoadRevision"),
    ("POST", "/admin/v1/models/promote", "PromoteRevision"),
    ("POST", "/admin/v1/models/rollback", "RollbackRevision"),
    ("POST", "/admin/v1/models/unload", "UnloadRevision"),
    ("GET", "/admin/v1/operations", "ListOperations"),
    ("GET", "/admin/v1/operations/{id}", "GetOperation"),
    ("POST", "/admin/v1/operations/{id}/cancel", "CancelOperation"),
    ("GET", "/admin/v1/log", "GetLog"),
    ("GET", "/admin/v1/workers", "ListWorkers"),
    ("GET", "/admin/v1/placement", "GetPlacement"),
    ("GET", "/admin/v1/load", "GetExpertLoad"),
)
"""HTTP method, path and gRPC method. Path parameters and the query set fields of the message;
``model`` names the model that the call concerns, if several are served."""
MAX_CONNECTIONS = 256


def build_admin_app(gateway: Gateway) -> FastAPI:
    app = FastAPI(
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={HTTPException: route_error},
    )
    calls = AdminCallsByModel(gateway)
    routes: list[BaseRoute] = [
        Route(path, _Endpoint(gateway, calls, name).serve, methods=[method])
        for method, path, name in ROUTES
    ]
    routes += [
        *dashboard.routes(gateway, is_admin=True),
        Route("/health", _health, methods=["GET"]),
    ]
    app.router.routes.extend(routes)
    app.add_middleware(
        HttpMiddleware,
        gateway=gateway,
        keys=gateway.admin_keys,
        routes=routes,
        open_paths=UNAUTHENTICATED_PATHS | dashboard.open_paths(),
    )
    return app


_RULES = {
    FieldDescriptor.TYPE_UINT32: "must be a whole number from 0 to 4294967295",
    FieldDescriptor.TYPE_UINT64: "must be a whole number, 0 or more",
    FieldDescriptor.TYPE_DOUBLE: "must be a finite number",
    FieldDescriptor.TYPE_STRING: "must be a text",
    FieldDescriptor.TYPE_BOOL: "must be true or false",
}
_MAX_SHOWN = 64


@dataclass(frozen=True, slots=True)
class _Endpoint:
    gateway: Gateway
    calls: AdminCallsByModel
    name: str

    async def serve(self, request: Request) -> Response:
        """Serve one call: convert JSON to the request message, and the response message to JSON."""
        _check_no_web_page(request, self.gateway.limits.requires_admin_keys)
        fields: dict[str, Any] = {**request.query_params, **request.path_params}
        if request.method == "POST" and _has_body(request):
            if "content-type" not in request.headers:  # browsers may send these across sites
                raise RequestError("content-type must be application/json", "content-type")
            body = await read_json(request, self.gateway, dict)
            fields = {**body, **fields}
        model = fields.get("model") if self.name in REVISION_CALLS else fields.pop("model", None)
        if not isinstance(model, str | None):
            raise RequestError("model must be a text", "model")
        call = self.calls.of(self.name, model)
        message = GetMessageClass(SERVICE.methods_by_name[self.name].input_type)()
        for name, value in fields.items():
            _set_field(message, name, value)
        answer = json_format.MessageToDict(
            await call(message),
            preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
        )
        content = dump_json({"schema": 1, **answer})
        return Response(content, headers={"content-type": "application/json"})


def _set_field(message: Message, name: str, value: Any) -> None:
    """Set a field from JSON. Raises ``RequestError``."""
    try:
        json_format.ParseDict({name: value}, message)
    except (json_format.ParseError, OverflowError) as err:  # the latter: a number beyond a float
        known = message.DESCRIPTOR.fields_by_name
        field = known.get(name) or message.DESCRIPTOR.fields_by_camelcase_name.get(name)
        rule = f"is not a field: the fields are {', '.join(known)}"
        if field is not None:
            rule = _RULES.get(field.type, str(err))
        raise RequestError(f"{name} ({str(value)[:_MAX_SHOWN]}) {rule}", name) from err


def _check_no_web_page(request: Request, has_keys: bool) -> None:
    """Raise ``PermissionDeniedError`` for a request from a web page other than the dashboard.

    Without keys, any web page that an operator opens could start operations through the loopback
    interface: a POST without a body needs no CORS preflight, and a page whose host name resolves to
    loopback passes as same-origin. Therefore the dashboard must then have been loaded from an IP
    address or ``localhost``.
    """
    headers = request.headers
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    if origin is None and site == "none":
        return
    host = headers.get("host", "")
    is_own = site in ("same-origin", "none") and (origin is None or _host_of(origin) == host)
    if not (is_own and (has_keys or _is_address(host))):
        raise PermissionDeniedError("no web page except the dashboard may use the admin port")


def _host_of(origin: str) -> str | None:
    """Return ``host:port`` of an origin; None if it is not a URL."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _is_address(host: str) -> bool:
    """Whether ``host`` of ``host:port`` is an IP address or localhost."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name != "localhost":
            ip_address(name)
    except ValueError:
        return False
    return True


def _has_body(request: Request) -> bool:
    headers = request.headers
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


async def _health(request: Request) -> Response:
    return Response(status_code=200)


def admin_http_server(
    gateway: Gateway, host: str, port: int, *, shared: bool = False
) -> HttpListener:
    """Make the listener of the admin port, which is ``shared`` if other replicas also use it."""
    app, section = build_admin_app(gateway), gateway.limits
    options: dict[str, Any] = {"max_connections": MAX_CONNECTIONS, "is_shared": shared}
    return HttpListener(app, section, "admin HTTP", host, port, **options)
