"""The application and the OpenAPI document of all protocols of the HTTP port."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from gateway.batches import routes as batches
from gateway.calls.gateway import Gateway
from gateway.http import openapi
from gateway.http.api import HttpProtocol, build_http_app
from gateway.responses import endpoint as responses
from gateway.responses.openapi import ENDPOINTS as RESPONSES

PROTOCOLS = (
    HttpProtocol(responses.routes, RESPONSES),
    HttpProtocol(batches.routes, batches.ENDPOINTS),
)
"""Protocols of the HTTP port besides completions and chat."""
ENDPOINTS = (*openapi.ENDPOINTS, *(one for protocol in PROTOCOLS for one in protocol.endpoints))
"""All endpoints, in the order of the documentation."""


def build_public_app(gateway: Gateway, *, is_behind_serve: bool = False) -> FastAPI:
    """Build the ASGI application of the public port; see ``build_http_app``."""
    return build_http_app(gateway, PROTOCOLS, is_behind_serve=is_behind_serve)


def document(root_path: str = "") -> dict[str, Any]:
    """Build the OpenAPI document."""
    return openapi.document(root_path, ENDPOINTS)
