"""Input of one start, and all checks that need no process.

This module does not import Ray or torch and starts no process, so that an invalid request fails in
well under a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import random
import socket
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.config.gateway import reachable_host
from cluster.config.resources import NodeResources
from cluster.core.addresses import split_address
from cluster.core.checks import check
from cluster.core.errors import first_line
from cluster.launch.model_plan import ModelPlan
from cluster.launch.state_file import Command, all_records
from cluster.sizing.start_plan import plan_start

_PORTS = (20_000, 30_000)
"""Range of ports for ``free_port``, between Ray's worker ports and Kubernetes' node ports."""
_PORT_TRIES = 50
_ROUNDING = 1e-3
"""Tolerance for sums of fractions of CPUs and GPUs."""
START_LIMIT_S = 1800.0
"""Default time limit of a start in seconds; large checkpoints on slow disks take minutes."""
EVERY_INTERFACE = ("0.0.0.0", "::")
"""Values of ``host`` that stand for every interface."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchPlan(ModelPlan):
    """Input of a launcher process, sent to the launcher as JSON.

    The fields of ``ModelPlan`` describe the first model.
    """

    command: Command
    """Command that starts the cluster: ``serve`` or ``up``."""
    name: str
    """Name of the cluster and of its state file."""
    asked: dict[str, str]
    """The user's options by flag, which a second ``up`` compares with its own options."""
    address: str
    """Address of the Ray cluster to join; empty for a private Ray."""
    temp_dir: str
    """Folder of the private Ray; empty for a joined Ray."""
    num_cpus: int
    """Number of CPUs of the private Ray."""
    num_gpus: int
    """Number of GPUs of the private Ray."""
    wait_nodes: int = 0
    """Number of nodes of the joined Ray to wait for before planning."""
    start_limit_s: float = START_LIMIT_S
    gateway_address: str = ""
    """Address for clients if the gateway listens on every interface; empty for this host."""
    others: tuple[ModelPlan, ...] = ()
    """The other models that are served, if there are several."""

    @property
    def models(self) -> tuple[ModelPlan, ...]:
        """All models that are served, the default model first."""
        return (self, *self.others)

    @property
    def private_nodes(self) -> tuple[NodeResources, ...]:
        """This host with its resources, as the only node of a private Ray."""
        cpus, gpus = float(self.num_cpus), float(self.num_gpus)
        return (NodeResources(node_id="", address="here", cpus=cpus, gpus=gpus),)

    def planned(self, nodes: Sequence[NodeResources], free_cpus: float | None = None) -> LaunchPlan:
        """Return the plan with every model ``resolved``; check that all workers fit on the nodes.

        Raises ``ConfigError``.
        """
        first, *others = (model.resolved(nodes, free_cpus) for model in self.models)
        shares: Counter[str] = Counter()
        for model in (first, *others):
            config, banks = model.config, model.facts.banks
            share = plan_start(config, banks, nodes, free_cpus, model.profile).share
            number = sum(config.workers.pools.values())
            shares.update({"cpus": share.cpus * number, "gpus": share.gpus * number})
        for kind in ("cpus", "gpus") if others else ():
            available = sum(getattr(node, kind) for node in nodes)
            rule = f"must fit: all models need {shares[kind]:g}, the nodes have {available:g}"
            is_room = shares[kind] <= available + _ROUNDING
            check(is_room, f"{kind}_per_worker", f"{shares[kind]:g}", rule)
        return dataclasses.replace(self, config=first.config, others=tuple(others))

    @property
    def http_url(self) -> str:
        """URL for HTTP clients."""
        return f"{self._scheme}://{self._reachable}:{self.config.gateway.port}"

    @property
    def serve_proxy_url(self) -> str:
        """URL of Ray Serve's own proxy; empty without that proxy."""
        section = self.config.gateway
        if section.serve_proxy is None:
            return ""
        return f"{self._scheme}://{self._reachable}:{section.serve_proxy}"

    @property
    def grpc_target(self) -> str:
        """Address ``host:port`` for gRPC clients."""
        return f"{self._reachable}:{self.config.gateway.grpc_port}"

    @property
    def _scheme(self) -> str:
        return "https" if self.config.gateway.has_tls else "http"

    @property
    def _reachable(self) -> str:
        host = self.config.gateway.host
        return reachable_host((self.gateway_address or host) if host in EVERY_INTERFACE else host)


def option_differences(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """Describe each option that differs between a running cluster and a new request."""
    flags = sorted({*there, *here})
    return [
        f"{flag}: {there.get(flag) or 'default'}, not {here.get(flag) or 'default'}"
        for flag in flags
        if there.get(flag) != here.get(flag)
    ]


def check_ports(host: str, ports: Mapping[str, int]) -> None:
    """Raise ``ConfigError`` if a port cannot be bound. ``ports``: port number by setting name."""
    for name, port in ports.items():
        try:
            _probe_port(host, port).close()
        except socket.gaierror as err:
            check(False, "host", host, f"cannot be resolved: {err.strerror}")
        except OSError as err:
            rule = f"cannot be opened on {host}: {err.strerror}"
            if err.errno == errno.EADDRINUSE:
                rule = f"is in use on {host}{_port_owner(port)}"
            check(False, name, port, rule)


def claim_ports(host: str, ports: Mapping[str, int]) -> list[socket.socket]:
    """Claim ports against other clusters of this host; return the sockets that hold the claims.

    The claims end when the sockets are closed. Gateways share ports with SO_REUSEPORT, so the
    kernel would let two clusters share ports that start at the same time. The sockets are abstract
    Unix sockets, which exist on Linux only; elsewhere, the result is empty.

    Raises:
        ConfigError: another cluster has claimed a port.
    """
    claims = []
    for name, port in ports.items() if sys.platform == "linux" else ():
        if not port:
            continue  # the kernel chooses a free one
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        claims.append(claim)
        digest = hashlib.sha256(f"{host}:{port}".encode()).hexdigest()  # a host may be too long
        try:
            claim.bind(f"\0expertmesh {digest}")
        except OSError:
            for one in claims:
                one.close()
            check(False, name, port, f"is in use on {host} by a cluster that starts now")
    return claims


def _port_owner(port: int) -> str:
    """Return which process listens on a port, as `` by python3 (pid 7)``; empty if unknown.

    If the port belongs to a recorded cluster of this host, the text names the cluster.
    """
    for record in all_records():
        if port in (split_address(record.http)[1], split_address(record.grpc)[1]):
            return f" by the cluster {record.name}"
    import psutil

    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.Error):
            for one in process.net_connections("tcp"):
                if one.status == psutil.CONN_LISTEN and one.laddr.port == port:
                    return f" by {process.info['name']} (pid {process.pid})"
    return ""


def free_port(host: str) -> int:
    """Return a free port, if possible outside the kernel's range of ephemeral ports.

    The port is opened only after Ray and the workers have opened many ephemeral ports.
    """
    first, last = _PORTS
    if (lowest := _lowest_ephemeral_port()) > first:
        for _ in range(_PORT_TRIES):
            port = random.SystemRandom().randrange(first, min(last, lowest))
            with contextlib.suppress(OSError), contextlib.closing(_probe_port(host, port)):
                return port
    with contextlib.closing(_probe_port(host, 0)) as probe:
        return int(probe.getsockname()[1])


def _lowest_ephemeral_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0  # not on Linux


def _probe_port(host: str, port: int) -> socket.socket:
    """Return a listening socket without SO_REUSEPORT. Raises ``OSError`` if the port is in use."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as err:  # a part of the name is empty or too long
        raise socket.gaierror(socket.EAI_NONAME, first_line(err)) from err
    family, kind, number, _, address = found[0]
    probe = socket.socket(family, kind, number)
    try:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # no wait for old connections
        probe.bind(address)
        probe.listen(1)  # with SO_REUSEADDR, only listen fails if another socket listens
    except OSError:
        probe.close()
        raise
    return probe


def count_gpus() -> int:
    """Return the number of NVIDIA devices that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([d for d in visible.split(",") if d.strip() and d.strip() != "-1"])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
