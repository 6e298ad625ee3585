"""What a served cluster shows to the outside, and writes down."""

from __future__ import annotations

import contextlib
import ipaddress
from pathlib import Path

import grpc
import psutil
import pytest

from benchmarks.harness.server import WAIT_S, Served
from cluster.launch.joining import allows_unauthenticated
from cluster.launch.orphans import find_by_files
from tests.gateway.calls.test_secrecy import KEY, MARK, ask_everything

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("unharmed")]

REPLICA = "ray::ServeReplica:expertmesh:gateway"
"""Ray binds its server between Serve's parts to every interface, and nothing changes that."""
_CHUNK_BYTES = 1 << 20


def listeners(server: Served) -> list[tuple[str, str, int]]:
    """Process, address and port of all that a server opened: launcher, Ray, workers, gateway."""
    found = []
    for pid in {p.pid for p in find_by_files(server.folder)} | {server.record.launcher.pid}:
        with contextlib.suppress(psutil.Error):  # Ray ends idle workers at any time
            process = psutil.Process(pid)
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.append((process.name(), *connection.laddr))
    return found


def test_everything_listens_on_loopback(server: Served) -> None:
    found = listeners(server)
    assert len(found) >= 7
    outside = []
    for name, address, port in found:
        ip = ipaddress.ip_address(address)
        mapped = getattr(ip, "ipv4_mapped", None) or ip
        if not mapped.is_loopback:
            outside.append((name, address, port))
    assert {name for name, *_ in outside} <= {REPLICA}, outside
    for _, _, port in outside:
        assert asks_for_token(port)


def asks_for_token(port: int) -> bool:
    """Whether the server between Serve's parts, which unpickles, refuses calls without a token."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for method in ("HandleRequest", "HandleRequestWithRejection"):
            call = channel.unary_unary(f"/ray.serve.ASGIService/{method}", bytes, bytes)
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", timeout=WAIT_S)
            if caught.value.code() is not grpc.StatusCode.UNAUTHENTICATED:
                return False
    return True


def test_ray_asks_everybody_for_its_token(server: Served) -> None:
    assert not allows_unauthenticated(server.record.address)


def test_no_log_has_a_prompt_or_a_key(server: Served) -> None:
    ask_everything(server.client, server.grpc, KEY)
    server.wait_idle()
    logs = [path for path in server.folder.rglob("*") if path.is_file() and is_log(path)]
    assert len(logs) > 10
    assert [path.name for path in logs if holds(path, MARK.encode())] == []
    token = (server.folder / "token").read_bytes()
    assert [path.name for path in logs if holds(path, token)] == []
    request = logs[0].read_bytes()  # the search can find something
    assert not request or holds(logs[0], request[:40])


def is_log(path: Path) -> bool:
    return path.suffix in (".log", ".out", ".err", ".txt") or "logs" in path.parts


def holds(path: Path, data: bytes) -> bool:
    """Whether a file has some bytes, read piece by piece."""
    tail = b""
    with path.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            if data in tail + piece:
                return True
            tail = piece[-len(data) :]
    return False
