"""Ray Serve's proxy from the clients' side: ready, and with TLS as configured."""

from __future__ import annotations

import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

from cluster.config.gateway import GatewaySection
from cluster.core.addresses import split_address
from cluster.core.errors import ConfigError, StartError

HAPROXY_VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"
"""Switches Serve's HAProxy mode on."""
_POLL_S = 0.1
_CALL_LIMIT_S = 5.0


def check_haproxy(section: GatewaySection, environment: Mapping[str, str]) -> None:
    """Raise ``ConfigError`` for TLS behind HAProxy, which Serve starts without certificates."""
    if section.has_tls and environment.get(HAPROXY_VARIABLE) == "1":
        rule = f"cannot be used in Ray Serve's HAProxy mode ({HAPROXY_VARIABLE}=1): put a proxy"
        raise ConfigError("tls_cert", section.tls_cert, f"{rule} with TLS in front, or unset it")


def wait_ready(
    url: str, section: GatewaySection, ask: Callable[[], list[str]], limit_s: float = 60.0
) -> None:
    """Wait until the gateway is ready and reachable through the proxy.

    Args:
        url: the gateway's, without a path.
        section: what the proxy requires of clients.
        ask: why the gateway is not ready; used if this process has no client certificate.
        limit_s: time for the gateway to become ready after everything else.

    Raises ``StartError`` after the limit, or if the proxy accepts clients that it must refuse.
    """
    deadline = time.monotonic() + limit_s
    while True:
        if section.tls_client_ca is None:
            reasons = _ask_ready(url, section.has_tls)
        else:
            reasons = "; ".join(ask()) or _try_without_certificate(url)
        if not reasons:
            return
        if time.monotonic() > deadline:
            raise StartError("gateway", f"not ready: {reasons}")
        time.sleep(_POLL_S)


def _ask_ready(url: str, has_tls: bool) -> str:
    """Why ``/ready`` does not answer 200; empty if it does."""
    # unverified: it is our own proxy, and the request holds no secret
    context = _unverified() if has_tls else None
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=_CALL_LIMIT_S, context=context):
            return ""
    except urllib.error.HTTPError as err:
        return err.read().decode(errors="replace")
    except OSError as err:
        return str(err)


def _try_without_certificate(url: str) -> str:
    """Why the proxy may not require client certificates yet; empty if it does.

    Raises ``StartError`` if it does not.
    """
    try:
        address = split_address(url.partition("://")[2])
        plain = socket.create_connection(address, _CALL_LIMIT_S)
    except OSError as err:
        return str(err)
    with plain:
        try:
            with _unverified().wrap_socket(plain) as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\nhost: expertmesh\r\n\r\n")
                answer = connection.recv(64)  # with TLS 1.3 a refusal comes only now
        except TimeoutError as err:
            return str(err)
        except OSError:  # alert or reset
            return ""
    if answer:
        raise StartError("gateway", "Ray Serve's proxy takes clients without certificates")
    return ""


def _unverified() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
