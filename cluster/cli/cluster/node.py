"""``node``: adds this host to a Ray cluster by ``ray start`` with expertmesh's settings.

expertmesh node --head --role gateway             on the first host
expertmesh node --join HOST --role expert         on every other host
expertmesh up --address auto --wait-nodes N       once, on any of them
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

from cluster.cli.terminal.arguments import CommandParsers, Number, count_or_0, positive
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import note
from cluster.core.node_labels import DEVICE_SPEED, FAILURE_DOMAIN, LINK_CLASS, ROLE, ROLES
from cluster.disk.files import replace_file
from cluster.launch import local_ray, state_file

DEFAULT_PORT = 6379
TOKEN_FILE = "ray-token"
"""Name of the file with the Ray cluster's token, in the folder of cluster records."""
_LABELS = {
    "role": ROLE,
    "failure_domain": FAILURE_DOMAIN,
    "link_class": LINK_CLASS,
    "device_speed": DEVICE_SPEED,
}
_PORT = Number(kind=int, rule="must be a port number (1 to 65535)", low=1, high=65535)
_OBJECT_STORE_BYTES = 256 * 1024 * 1024
_LIMITS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    # after SIGTERM: time for the workers to hand over their requests and experts
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "120",
    # hosts outlive a head that restarts
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
}
"""Environment variables with which Ray detects a silent host after 6 to 9 s instead of 65 s."""


def add_commands(commands: CommandParsers) -> None:
    node = commands.add("node", run_node, "start Ray on this host, for a cluster of several hosts")
    which = node.add_mutually_exclusive_group(required=True)
    which.add_argument("--head", action="store_true", help="Start the head of a new Ray cluster")
    which.add_argument("--join", metavar="HOST[:PORT]", help="Address of the head to join")
    text = "Port of the new head"
    node.add_argument("--port", type=_PORT, default=DEFAULT_PORT, metavar="PORT", help=text)
    node.add_argument("--node-ip", metavar="IP", help="IP address of this host for the other hosts")
    text = "Role of this host's workers (default: all roles that no other host has)"
    node.add_argument("--role", choices=ROLES, help=text)
    text = "Name of the group of hosts that fail together (default: this host)"
    node.add_argument("--failure-domain", metavar="NAME", help=text)
    text = "Name of the group of hosts with fast links between them (default: this host)"
    node.add_argument("--link-class", metavar="NAME", help=text)
    text = "Speed of a worker here, relative to other hosts (default: 1)"
    node.add_argument("--device-speed", type=_speed, metavar="NUMBER", help=text)
    for kind in ("cpus", "gpus"):
        text = f"{kind.upper()[:-1]}s of this host that Ray may assign (default: all)"
        node.add_argument(f"--num-{kind}", type=count_or_0, metavar="N", help=text)
    text = "File with the token of the cluster, see docs/how-to/multi-host.md"
    node.add_argument("--token-file", metavar="FILE", help=text)
    node.add_argument("--background", action="store_true", help="Return once Ray runs on this host")


def _speed(text: str) -> str:
    """Return ``text`` after checking that it is a number; Ray requires text for labels."""
    positive(text)
    return text


def run_node(args: argparse.Namespace) -> int:
    """Replace this process by ``ray start``. Raises ``CommandError``."""
    environment = node_environment(args, os.environ)
    command = ray_start(args)
    if args.verbose:
        note(" ".join(command))
    if args.head:
        command += redis_password(os.environ)
    sys.stdout.flush()
    os.execve(command[0], command, environment)


def ray_start(args: argparse.Namespace) -> list[str]:
    """Return the command line of ``ray start`` for the options."""
    words = [sys.executable, "-m", "ray.scripts.scripts", "start"]
    if args.head:
        words += ["--head", f"--port={args.port}", "--include-dashboard=false"]
    else:
        words.append(f"--address={args.join if ':' in args.join else f'{args.join}:{args.port}'}")
    if args.node_ip:
        words.append(f"--node-ip-address={args.node_ip}")
    for name, value in (("cpus", args.num_cpus), ("gpus", args.num_gpus)):
        if value is not None:
            words.append(f"--num-{name}={value:g}")
    labels = [
        f"{key}={value}"
        for name, key in _LABELS.items()
        if (value := getattr(args, name)) is not None
    ]
    if labels:
        words.append(f"--labels={','.join(labels)}")
    words += [f"--object-store-memory={_OBJECT_STORE_BYTES}", "--disable-usage-stats"]
    return words if args.background else [*words, "--block"]


def redis_password(given: Mapping[str, str]) -> list[str]:
    """Return the ``ray start`` option for Redis's password; empty without a password.

    Other users of the host can see the password in the process list.
    """
    password = given.get("RAY_REDIS_PASSWORD")
    return [f"--redis-password={password}"] if password else []


def node_environment(args: argparse.Namespace, given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of ``ray start``: the token, and ``_LIMITS`` as defaults.

    Raises ``CommandError`` if there is no token.
    """
    ours = local_ray.common_environment()
    python_path = {"PYTHONPATH": ours["PYTHONPATH"]}  # includes the user's value
    return {**ours, **_LIMITS, **given, **python_path, **_token(args, given)}


def _token(args: argparse.Namespace, given: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables for the Ray cluster's token, which a head node creates.

    The user's variables take priority. Raises ``CommandError`` if there is no token.
    """
    if given.get("RAY_AUTH_MODE", "token") != "token":
        note("RAY_AUTH_MODE is not token: clients that reach Ray's ports can run code here")
        return {}
    if given.get("RAY_AUTH_TOKEN") and not args.token_file:
        return {"RAY_AUTH_MODE": "token"}
    named = args.token_file or given.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else state_file.state_dir() / TOKEN_FILE
    if not path.is_file():
        if not args.head:
            message = f"no token at {path}: copy the head's token there, or give --token-file"
            raise CommandError(ExitCode.REFUSED, message)
        _make_token(path)
        note(f"made a token: other hosts need {path}, with RAY_AUTH_MODE=token and")
        note(f"RAY_AUTH_TOKEN_PATH={path} for the other commands of expertmesh")
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path.absolute())}


def _make_token(path: Path) -> None:
    try:
        replace_file(path, secrets.token_hex(32).encode(), mode=0o600)
    except OSError as err:
        raise CommandError(ExitCode.REFUSED, f"--token-file ({path}): {err.strerror}") from err
