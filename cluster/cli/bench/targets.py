"""Makes the target (server) of a workload and reads the vocabulary size of the server's model."""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from cluster.cli.bench.workload import BenchTarget, RequestFailed
from cluster.cli.bench.workload_options import LIMIT_S
from cluster.cli.terminal.client import Client
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.tls import tls_files


def http_target(args: argparse.Namespace, client: Client) -> tuple[BenchTarget, int]:
    """Make a target that speaks OpenAI's protocol; return the target and the vocabulary size.

    Must be called in the event loop that sends the requests. Raises ``CommandError``.
    """
    from cluster.cli.bench.http_target import HttpTarget  # slow to import

    vocab_size = args.vocab_size or _vocab_size(client)
    return HttpTarget(client, args.model, _new_salt()), vocab_size


async def grpc_target(args: argparse.Namespace, client: Client) -> tuple[BenchTarget, int]:
    """Make a target that speaks gRPC; return the target and the vocabulary size.

    The address is that of ``--grpc``, or else the one that the server reports over HTTP. Raises
    ``CommandError``.
    """
    from cluster.cli.bench.grpc_target import GrpcTarget  # slow to import

    files = tls_files(args)
    target = GrpcTarget(
        args.grpc or _reported_address(client),
        headers=client.headers,
        tls_files=files if client.tls or any(files.values()) else None,
        model=args.model,
        cache_salt=_new_salt(),
        timeout_s=args.timeout or LIMIT_S,
    )
    try:
        return target, args.vocab_size or await target.vocab_size()
    except RequestFailed:
        await target.close()
        raise


def _new_salt() -> str:
    """Make a random cache salt, so that no cached prefix of an earlier run is reused."""
    return f"bench-{uuid.uuid4().hex}"


def _reported_address(client: Client) -> str:
    status = client.get("/cluster/v1/status")
    host = urlsplit(client.url).hostname or ""
    host = f"[{host}]" if ":" in host else host
    found = [
        each["grpc"] if "grpc" in each else f"{host}:{each['grpc_port']}"
        for each in status.get("gateway", ())
        if "grpc" in each or "grpc_port" in each
    ]
    if not found:
        raise CommandError(ExitCode.REFUSED, "the server has no gRPC address: give one with --grpc")
    return str(found[0])


def _vocab_size(client: Client) -> int:
    try:
        status: Mapping[str, Any] = client.get("/cluster/v1/status")
    except CommandError as err:
        if err.code == ExitCode.UNREACHABLE:
            raise
        message = f"{client.url} does not report its vocabulary ({err}): give --vocab-size"
        raise CommandError(ExitCode(err.code), message) from err
    try:
        facts: Any = status.get("model")
        return int(facts.get("vocab_size"))
    except (TypeError, ValueError, AttributeError) as err:
        message = f"the cluster is {status.get('state', 'no cluster')}: its model is not known yet"
        raise CommandError(ExitCode.NOT_READY, message) from err
