"""Five pretend hosts with labels of roles, and a cluster as in ``docs/how-to/multi-host.md``.

h0 is Ray's head and runs nothing of ours, h1 the gateway and the controller, h2 attention, h3 and
h4 experts. Ray asks for a token.
"""

from __future__ import annotations

import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.harness.clients import redis_server
from tests.pretend_hosts.hosts import TIMEOUT_S, NodeHosts, address_of, host_of, wait_until, why_not

ROLES = {"h1": "gateway", "h2": "attention", "h3": "expert", "h4": "expert"}
HEAD, GATEWAY, ATTENTION, SPARE = map(address_of, ("h0", "h1", "h2", "h4"))
UP = ("--host", "0.0.0.0", "--allow-unauthenticated")
SAME = ("--dtype", "float32", "--deterministic")


def url_of(gateway: str) -> str:
    """HTTP address of a gateway's host."""
    return f"http://{address_of(gateway)}:8000"


URL = url_of("h1")
REDIS_PORT = 6390
REDIS_PASSWORD = "of-redis"
CLI = (sys.executable, "-m", "cluster.cli.main")


class RoleHosts(NodeHosts):
    """Hosts on which ``expertmesh node`` runs in the foreground."""

    def __init__(
        self,
        folder: Path,
        options: tuple[str, ...],
        redis: str = "",
        roles: Mapping[str, str] = ROLES,
    ) -> None:
        """``options`` of ``up``; ``redis`` is where the head keeps Ray's state; empty: nowhere.

        ``roles`` are those of the hosts; the head, ``h0``, may have one, too.
        """
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        more = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        super().__init__(folder, EXPERTMESH_URL=URL, **more)
        self.names = ("h0", *(host for host in roles if host != "h0"))
        self.options = ("--wait-nodes", str(len(self.names)), *UP, *SAME, *options)
        self._redis = redis
        self.roles = roles

    def begin_node(self, host: str) -> None:
        """Have a host join (or begin) the Ray cluster."""
        words = ["node", "--node-ip", address_of(host)]
        if host in self.roles:
            words += ["--role", self.roles[host]]
        words += ["--num-cpus", str(int(host in self.roles))]
        if host == "h0":
            state = redis_variables(self._redis) if self._redis else []
            self.run("exec", host, "env", *state, *CLI, *words, "--head", "--background")
        else:
            self.begin(host, *CLI, *words, "--join", HEAD)

    def come_back(self, host: str) -> None:
        """Boot a host once it is quite gone, and have it join."""
        wait_until(lambda: self.boots(host), f"{host} is quite gone")
        self.begin_node(host)

    def command(self, host: str, *words: str) -> str:
        """Stdout of an ``expertmesh`` command on a host; it must exit with 0."""
        return self.run("exec", host, *CLI, *words)

    def asks(self, host: str, *words: str) -> bool:
        """Whether an ``expertmesh`` command on a host exits with 0."""
        try:
            self.command(host, *words)
        except AssertionError:
            return False
        return True

    def up(self, host: str = "h0") -> str:
        """``up``, from any host."""
        return self.command(host, "up", "--address", "auto", *self.options)

    def status(self, gateway: str = "h1") -> dict[str, Any]:
        """``status`` as a client of a gateway's host sees it."""
        return self.fetch(gateway, f"{url_of(gateway)}/cluster/v1/status")

    def serving(self, gateway: str = "h1") -> dict[str, int]:
        """Process of each worker that serves."""
        workers = self.status(gateway)["workers"]
        return {w["name"]: w["pid"] for w in workers if w["state"] == "SERVING"}


@contextmanager
def role_hosts(*options: str, roles: Mapping[str, str] = ROLES) -> Iterator[RoleHosts]:
    """Hosts with a cluster that ``up`` has started. With Redis it keeps Ray's state."""
    if reason := why_not():
        pytest.skip(reason)
    server = redis_server()
    state = f"{ATTENTION}:{REDIS_PORT}" if server else ""  # faults cut others off from the head
    with tempfile.TemporaryDirectory(prefix="em", dir="/tmp") as folder:
        made = RoleHosts(Path(folder), options, state, roles)
        redis = None
        try:
            made.run("up", str(len(made.names)))
            if server:
                words = ["--port", str(REDIS_PORT), "--requirepass", REDIS_PASSWORD, "--save", ""]
                log = Path(folder) / "redis.log"
                redis = made.start(host_of(ATTENTION), server, *words, log=log)
            for host in made.names:
                made.begin_node(host)
            made.up()
            yield made
        finally:
            made.close()
            if redis is not None:
                redis.communicate(timeout=TIMEOUT_S)


def redis_variables(address: str) -> list[str]:
    return [f"RAY_REDIS_ADDRESS={address}", f"RAY_REDIS_PASSWORD={REDIS_PASSWORD}"]
