"""Client certificates: Serve's proxy hands the CA to uvicorn, and uvicorn asks for none by default.

Upstream: Serve has ``ssl_ca_certs`` and no ``ssl_cert_reqs``; no issue known.
"""

from __future__ import annotations

import functools
import ssl
from typing import Any

import uvicorn.config


@functools.cache
def demand_client_certificates() -> None:
    """Require a certificate of every client of servers with a CA for clients, from now on.

    Every start of a cluster tests that this takes effect (``cluster.launch.serve_proxy``).
    """
    make = uvicorn.config.create_ssl_context

    @functools.wraps(make)
    def make_strict(*args: Any, **options: Any) -> ssl.SSLContext:
        context = make(*args, **options)
        if options.get("ca_certs"):
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    uvicorn.config.create_ssl_context = make_strict
