"""Clients of a running cluster."""

from __future__ import annotations

from typing import Unpack
from urllib.parse import urlsplit

from expertmesh.calls import AsyncCalls, SyncCalls, Transport
from expertmesh.grpc_transport import GrpcTransport
from expertmesh.http_transport import HttpTransport
from expertmesh.options import DEFAULT_TIMEOUT_S, ClientOptions
from expertmesh.types import check_names

DEFAULT_URL = "http://127.0.0.1:8000"
_MAX_TIMEOUT_S = 365 * 24 * 3600.0
"""Longest time limit of a request in seconds. gRPC calls with a limit of centuries end at once, and
aiohttp rejects an infinite limit."""
_TLS_OPTIONS = ("ca_cert", "client_cert", "client_key")


class AsyncClient(AsyncCalls):
    """Asynchronous client of a cluster. Construct and close it on the event loop that uses it.

    Args:
        base_url: ``http[s]://host:port[/v1]`` or ``grpc[s]://host:port``; ``s`` selects TLS.
        options: see ``ClientOptions``.

    Raises:
        ValueError: an option or ``base_url`` is invalid, or TLS options are set without TLS.
        OSError: a file of the TLS options cannot be read, or is not valid.
    """

    def __init__(self, base_url: str = DEFAULT_URL, **options: Unpack[ClientOptions]) -> None:
        super().__init__(_connect(base_url, options), options.get("model"))


class Client(SyncCalls):
    """Synchronous client of a cluster, with the arguments and errors of ``AsyncClient``."""

    def __init__(self, base_url: str = DEFAULT_URL, **options: Unpack[ClientOptions]) -> None:
        super().__init__(lambda: AsyncClient(base_url, **options))


def _connect(url: str, options: ClientOptions) -> Transport:
    check_names(options, ClientOptions)
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https", "grpc", "grpcs") or not parts.hostname:
        rule = "must be http://, https://, grpc:// or grpcs://, a host and a port"
        raise ValueError(f"base_url ({url}) {rule}")
    if not parts.scheme.endswith("s") and any(options.get(name) for name in _TLS_OPTIONS):
        raise ValueError(f"base_url ({url}) must be https:// or grpcs:// with TLS options")
    if options.get("client_key") and not options.get("client_cert"):
        raise ValueError(f"client_key ({options['client_key']}) must be given with client_cert")
    timeout_s = options.get("timeout_s", DEFAULT_TIMEOUT_S)
    if not isinstance(timeout_s, int | float) or not timeout_s > 0:
        raise ValueError(f"timeout_s ({timeout_s}) must be a number above 0")
    options = options | ClientOptions(timeout_s=min(timeout_s, _MAX_TIMEOUT_S))
    if parts.scheme in ("http", "https"):
        return HttpTransport(url, options)
    if parts.path.strip("/"):
        raise ValueError(f"base_url ({url}) must have no path with {parts.scheme}://")
    return GrpcTransport(parts.netloc, parts.scheme == "grpcs", options)
