"""Clients of a running cluster."""

from __future__ import annotations

from urllib.parse import urlsplit

from expertmesh.calls import AsyncCalls, SyncCalls, Transport
from expertmesh.grpc_transport import GrpcTransport
from expertmesh.http_transport import HttpTransport
from expertmesh.loop_thread import LoopThread

DEFAULT_TIMEOUT_S = 600.0


class AsyncClient(AsyncCalls):
    """Asynchronous client of a cluster. Construct and close it on the event loop that uses it.

    Args:
        base_url: ``http://``, ``https://``, ``grpc://`` or ``grpcs://`` (TLS), host and port.
        api_key: key of the server; None sends none.
        model: name of a model or adapter; None selects the served model.
        timeout_s: maximum duration of a request in seconds.

    Raises:
        ValueError: ``base_url`` is not such a URL.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        super().__init__(_connect(base_url, api_key, timeout_s), model)


class Client(SyncCalls):
    """Synchronous client of a cluster, with the arguments and errors of ``AsyncClient``."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        _check_url(base_url)

        async def start() -> AsyncCalls:
            return AsyncClient(base_url, api_key=api_key, model=model, timeout_s=timeout_s)

        thread = LoopThread()
        super().__init__(thread.run(start()), thread)


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https", "grpc", "grpcs") or not parts.hostname:
        rule = "must be http://, https://, grpc:// or grpcs://, a host and a port"
        raise ValueError(f"base_url ({url}) {rule}")


def _connect(url: str, api_key: str | None, timeout_s: float) -> Transport:
    _check_url(url)
    parts = urlsplit(url)
    if parts.scheme in ("http", "https"):
        return HttpTransport(url, api_key, timeout_s)
    return GrpcTransport(parts.netloc, parts.scheme == "grpcs", api_key, timeout_s)
