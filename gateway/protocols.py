"""The protocols of the HTTP port, in one application and one OpenAPI document."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from gateway.batches import routes as batches
from gateway.generation.gateway import Gateway
from gateway.http import openapi
from gateway.http.api import Protocol, build_http_app
from gateway.responses import endpoint as responses
from gateway.responses.openapi import ENDPOINTS as RESPONSES

PROTOCOLS = (
    Protocol(responses.routes, RESPONSES),
    Protocol(batches.routes, batches.ENDPOINTS),
)
"""Those beside completions, chat and what goes with them."""
ENDPOINTS = (*openapi.ENDPOINTS, *(one for protocol in PROTOCOLS for one in protocol.endpoints))
"""All routes, in the order of the interface."""


def build_public_app(gateway: Gateway, *, is_behind_serve: bool = False) -> FastAPI:
    """The ASGI application of the public port; see ``build_http_app``."""
    return build_http_app(gateway, PROTOCOLS, is_behind_serve=is_behind_serve)


def document(root_path: str = "") -> dict[str, Any]:
    """The OpenAPI document."""
    return openapi.document(root_path, ENDPOINTS)
