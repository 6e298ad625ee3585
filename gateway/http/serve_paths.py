"""The paths under which Ray Serve's proxy answers load balancers and KubeRay, on our own port."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from gateway.generation.gateway import Gateway

HEALTH_PATH = "/-/healthz"
ROUTES_PATH = "/-/routes"
SERVE_PATHS = frozenset({HEALTH_PATH, ROUTES_PATH})
APP_NAME = "expertmesh"
"""The Serve application."""
_LEAVING = PlainTextResponse("This node is being drained.", 503)
"""Serve's words."""


def serve_routes(gateway: Gateway) -> list[BaseRoute]:
    """Answers as of a Serve proxy whose only application is mounted at ``/``."""

    async def health(request: Request) -> Response:
        """Whether a load balancer may send requests here: until the gateway leaves."""
        return _LEAVING if gateway.readiness.is_leaving else PlainTextResponse("success")

    async def routes(request: Request) -> Response:
        """The application by its prefix."""
        return _LEAVING if gateway.readiness.is_leaving else JSONResponse({"/": APP_NAME})

    return [Route(HEALTH_PATH, health), Route(ROUTES_PATH, routes)]
