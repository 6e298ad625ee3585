"""Everything that runs inside Ray Serve's proxy, in one list."""

from __future__ import annotations

from starlette.middleware import Middleware

from gateway.serve_proxy.bounded_protocol import bound_headers
from gateway.serve_proxy.client_certificates import demand_client_certificates
from gateway.serve_proxy.expect_continue import ExpectContinueGuard
from gateway.serve_proxy.malloc_trim import start_returning
from gateway.serve_proxy.receipt_sender import ReceiptSender
from gateway.serve_proxy.refusal_echo import RefusalEcho
from gateway.serve_proxy.request_id_guard import RequestIdGuard
from gateway.serve_proxy.unserved_guard import UnservedGuard

PROXY_CALLBACK = f"{__name__}.proxy_middlewares"
"""Value of RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, which Serve's proxy reads at its start."""


def proxy_middlewares() -> list[Middleware]:
    """What ``PROXY_CALLBACK`` names: patches of the process, then middlewares, inside out."""
    demand_client_certificates()
    bound_headers()
    start_returning()
    guards = (UnservedGuard, RefusalEcho, ExpectContinueGuard, RequestIdGuard, ReceiptSender)
    return [Middleware(guard) for guard in guards]
