"""Readiness probe of the gateway, for which the launcher waits at the end of a start."""

from __future__ import annotations

import http.client
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from cluster.config.gateway import GatewaySection
from cluster.core.errors import StartError

_POLL_S = 0.1
_CALL_LIMIT_S = 5.0


def wait_ready(
    url: str, section: GatewaySection, ask: Callable[[], list[str]], limit_s: float = 60.0
) -> None:
    """Wait until the gateway is ready and reachable over HTTP.

    Args:
        url: URL of the gateway, without a path.
        section: configuration of the gateway.
        ask: returns reasons why the gateway is not ready; used if clients need a certificate, which
            this process does not have.
        limit_s: time limit in seconds for the gateway to become ready after the other parts.

    Raises ``StartError`` after the limit.
    """
    deadline = time.monotonic() + limit_s
    while reasons := _ask_ready(url, section.has_tls) if not section.tls_client_ca else ask():
        if time.monotonic() > deadline:
            raise StartError("gateway", f"not ready: {'; '.join(reasons)}")
        time.sleep(_POLL_S)


def _ask_ready(url: str, has_tls: bool) -> list[str]:
    """Return reasons why ``/ready`` does not respond with status 200; empty if it does."""
    context = None
    if has_tls:  # unverified: it is the own server, and the request contains no secret
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    try:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=_CALL_LIMIT_S, context=context):
                return []
        except urllib.error.HTTPError as err:
            return [err.read().decode(errors="replace")]
    except (OSError, http.client.HTTPException) as err:  # also while the reasons are read
        return [str(err) or type(err).__name__]
