"""The health and route paths of Ray Serve's proxy, for load balancers and KubeRay."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from gateway.calls.gateway import Gateway

HEALTH_PATH = "/-/healthz"
ROUTES_PATH = "/-/routes"
SERVE_PATHS = frozenset({HEALTH_PATH, ROUTES_PATH})
APP_NAME = "expertmesh"
"""Name of the Serve application."""
_DRAINING_RESPONSE = PlainTextResponse("This node is being drained.", 503)
"""Response of Serve's proxy during a drain."""


def serve_routes(gateway: Gateway) -> list[BaseRoute]:
    """Return routes that respond like a Serve proxy with one application, mounted at ``/``."""

    async def health(request: Request) -> Response:
        """Respond with 200 while a load balancer may send requests, with 503 during a drain."""
        return _DRAINING_RESPONSE if gateway.readiness.is_leaving else PlainTextResponse("success")

    async def routes(request: Request) -> Response:
        """Return the name of the application by route prefix."""
        return _DRAINING_RESPONSE if gateway.readiness.is_leaving else JSONResponse({"/": APP_NAME})

    return [Route(HEALTH_PATH, health), Route(ROUTES_PATH, routes)]
