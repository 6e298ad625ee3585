"""Options of the clients."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TypedDict

DEFAULT_TIMEOUT_S = 600.0


class ClientOptions(TypedDict, total=False):
    """Options of ``Client`` and ``AsyncClient``."""

    api_key: str | None
    """API key to send; None sends no key."""
    model: str | None
    """Name of a model or adapter; None selects the served model."""
    timeout_s: float
    """Maximum duration of a request in seconds (default 600)."""
    ca_cert: str | Path | None
    """PEM file of the authorities that sign the server's certificate; None: the system's."""
    client_cert: str | Path | None
    """PEM file of the client's certificate, for servers that request one."""
    client_key: str | Path | None
    """PEM file of the private key of ``client_cert``."""


def tls_context(options: ClientOptions) -> ssl.SSLContext:
    """TLS context of the files in ``options``. Raises ``OSError``."""
    authorities, certificate = options.get("ca_cert"), options.get("client_cert")
    text = Path(authorities).read_text("ascii", "ignore") + "\n" if authorities else None
    context = ssl.create_default_context(cadata=text)
    if certificate:
        context.load_cert_chain(certificate, options.get("client_key"))
    return context
