"""TLS of all ports of a gateway: one server certificate, and optionally client certificates."""

from __future__ import annotations

import ssl
from typing import Any

import grpc

from cluster.config.gateway import GatewaySection
from gateway.auth.tls_files import read_file


def bind(server: grpc.aio.Server, address: str, section: GatewaySection) -> int:
    """Bind a gRPC server, with TLS if a certificate is configured; return the port.

    Raises ``ConfigError`` if a file cannot be read, and ``RuntimeError`` if gRPC cannot bind.
    """
    if not section.has_tls:
        return server.add_insecure_port(address)
    pair = (read_file(section, "tls_key"), read_file(section, "tls_cert"))
    root = read_file(section, "tls_client_ca") if section.tls_client_ca else None
    credentials = grpc.ssl_server_credentials([pair], root, require_client_auth=root is not None)
    return server.add_secure_port(address, credentials)


def tls_files(section: GatewaySection) -> dict[str, str]:
    """TLS options for uvicorn and Ray Serve, which use the same names; empty without TLS."""
    options = {
        "ssl_keyfile": section.tls_key,
        "ssl_certfile": section.tls_cert,
        "ssl_ca_certs": section.tls_client_ca,
    }
    return {name: value for name, value in options.items() if value is not None}


def uvicorn_options(section: GatewaySection) -> dict[str, Any]:
    """TLS options for uvicorn. With ``tls_client_ca``, clients must present a certificate."""
    if section.tls_client_ca is None:
        return dict(tls_files(section))
    return {**tls_files(section), "ssl_cert_reqs": ssl.CERT_REQUIRED}
