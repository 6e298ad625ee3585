"""Reads request bodies, with limits of size and time, and the client's timeout header."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from starlette.requests import Request

from cluster.core.errors import (
    DeadlineExceededError,
    RequestError,
    RequestTooLargeError,
    UnsupportedParameterError,
)
from gateway.calls.gateway import Gateway
from gateway.core.expect import waits_for_continue
from gateway.core.tuning import GatewayTuning
from gateway.http.parse import parse_json

MAX_TIMEOUT_MS = 99_999_999_999
"""Maximum value of the timeout header. The server's own time limit is shorter."""
_MAX_PENDING_FACTOR = 8
"""Multiple of the size limit up to which a too large body is read so that the client can read the
response. Beyond it, the connection is closed."""
Parsed = TypeVar("Parsed")
"""The result of an endpoint's body parser."""


async def read_json(
    request: Request, gateway: Gateway, read: Callable[[dict[str, Any]], Parsed]
) -> Parsed:
    """Read the JSON object of a request body and return ``read(object)``.

    A large body is parsed in a thread.

    Raises:
        RequestError: the body is not JSON, not declared as JSON, compressed, or nested too deeply.
        RequestTooLargeError: the body is above the size limit.
        DeadlineExceededError: the client sends too slowly.
    """
    content_type = request.headers.get("content-type", "application/json")
    kind = content_type.partition(";")[0].strip()
    if not (kind.lower() == "application/json" or kind.lower().endswith("+json")):
        raise RequestError(f"content-type {kind[:64]!r} must be application/json", "content-type")
    coding = request.headers.get("content-encoding", "identity").strip()
    if coding.lower() not in ("", "identity"):
        name = "content-encoding"
        raise UnsupportedParameterError(f"{name} {coding[:64]!r} is not supported", name)
    raw = await read_body(request, gateway.limits.max_body_bytes, gateway.tuning)
    max_depth = gateway.limits.max_json_depth
    return await gateway.long_work.run(len(raw), lambda: read(parse_json(raw, max_depth)))


def timeout_header_s(request: Request) -> float | None:
    """Return the client's timeout in seconds, or None. Raises ``RequestError`` if it is invalid."""
    name = "x-request-timeout-ms"
    value = request.headers.get(name)
    if value is None:
        return None
    is_number = value.isascii() and value.isdecimal() and len(value) <= len(str(MAX_TIMEOUT_MS))
    if not (is_number and int(value) > 0):
        rule = f"must be a whole number from 1 to {MAX_TIMEOUT_MS}"
        raise RequestError(f"{name} ({value[:32]!r}) {rule}", name)
    return int(value) / 1000


@contextlib.asynccontextmanager
async def limit_time(request: Request, gateway: Gateway) -> AsyncIterator[None]:
    """Cancel the enclosed block at the request's deadline; raise ``DeadlineExceededError``."""
    limit_s = gateway.timeout_s(timeout_header_s(request))
    try:
        async with asyncio.timeout(limit_s):
            yield
    except TimeoutError as err:
        raise DeadlineExceededError("the request's deadline has passed", started=True) from err


@contextlib.asynccontextmanager
async def using_model(
    request: Request, gateway: Gateway, name: str | None
) -> AsyncIterator[Gateway]:
    """Yield the gateway of a model or adapter, for a block within the request's deadline.

    See ``ServedModels.using`` and ``limit_time``.
    """
    async with limit_time(request, gateway):
        with gateway.shared.models.using(name) as model:
            yield model


async def read_body(request: Request, max_bytes: int, tuning: GatewayTuning) -> bytes:
    """Return the body. Raises ``RequestTooLargeError`` or ``DeadlineExceededError``."""
    length = request.headers.get("content-length", "")
    is_too_large = length.isdecimal() and int(length) > max_bytes
    pieces = request.stream()
    total = 0
    if not is_too_large:
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(tuning.body_timeout_s):
                async for chunk in pieces:
                    total += len(chunk)
                    if total > max_bytes:
                        break
                    chunks.append(chunk)
                else:
                    return b"".join(chunks)
        except TimeoutError as err:
            raise DeadlineExceededError("the body did not arrive in time") from err
    if not (is_too_large and waits_for_continue(request.headers)):
        await _read_pending(pieces, max_bytes * _MAX_PENDING_FACTOR - total, tuning)
    raise RequestTooLargeError(f"the body is above the limit of {max_bytes} bytes")


async def _read_pending(
    pieces: AsyncIterator[bytes], max_bytes: int, tuning: GatewayTuning
) -> None:
    """Read and drop the body until it ends, exceeds ``max_bytes`` or pauses for too long."""
    now_s = asyncio.get_running_loop().time
    end_s = now_s() + tuning.body_timeout_s
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(tuning.drain_pause_s) as limit:
            async for chunk in pieces:
                max_bytes -= len(chunk)
                if max_bytes < 0:
                    return
                limit.reschedule(min(end_s, now_s() + tuning.drain_pause_s))
