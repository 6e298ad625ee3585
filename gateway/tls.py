"""TLS of every port of a gateway: one certificate, and where asked for the clients' own."""

from __future__ import annotations

import functools
import ssl
from typing import Any

import grpc
import uvicorn.config

from cluster.gateway_config import GatewaySection
from gateway.tls_files import read_file


def bind(server: grpc.aio.Server, address: str, section: GatewaySection) -> int:
    """Bind a gRPC server, with TLS where there is a certificate; the port.

    Raises what gRPC raises (``RuntimeError``), and ``ConfigError``.
    """
    if not section.has_tls:
        return server.add_insecure_port(address)
    pair = (read_file(section, "tls_key"), read_file(section, "tls_cert"))
    root = read_file(section, "tls_client_ca") if section.tls_client_ca else None
    credentials = grpc.ssl_server_credentials([pair], root, require_client_auth=root is not None)
    return server.add_secure_port(address, credentials)


def serve_options(section: GatewaySection) -> dict[str, str]:
    """The HTTP options of Ray Serve."""
    options = {
        "ssl_keyfile": section.tls_key,
        "ssl_certfile": section.tls_cert,
        "ssl_ca_certs": section.tls_client_ca,
    }
    return {name: value for name, value in options.items() if value is not None}


def uvicorn_options(section: GatewaySection) -> dict[str, Any]:
    """The same for a uvicorn of our own, and what Serve leaves out: clients must have one."""
    if section.tls_client_ca is None:
        return dict(serve_options(section))
    return {**serve_options(section), "ssl_cert_reqs": ssl.CERT_REQUIRED}


def demand_client_certificates() -> None:
    """For Serve's proxy, in its process: with a CA for clients, a client must have a certificate.

    Serve hands the CA to uvicorn and leaves uvicorn at its default, which asks for nothing. Whether
    this takes effect is tried out at every start (``cluster.serve_proxy``).
    """
    make = uvicorn.config.create_ssl_context
    if getattr(make, "demands_certificates", False):
        return

    @functools.wraps(make)
    def make_strict(*args: Any, **options: Any) -> ssl.SSLContext:
        context = make(*args, **options)
        if options.get("ca_certs"):
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    make_strict.demands_certificates = True  # type: ignore[attr-defined]
    uvicorn.config.create_ssl_context = make_strict
