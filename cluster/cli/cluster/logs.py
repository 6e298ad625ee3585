"""``logs``: shows the logs of workers on any host, or of a cluster's launcher.

Running processes keep their newest lines in memory, which this command reads through the admin port
or Ray. The logs of an ended worker are read from its files, on its host.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.cli.cluster.followed_files import FollowedFile
from cluster.cli.terminal.admin_client import AdminClient, make_admin_client
from cluster.cli.terminal.arguments import (
    CommandParsers,
    add_address_option,
    add_served_model_option,
    count_or_0,
)
from cluster.cli.terminal.client import Client, find_record, require_full_status
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import note, write_json, write_result
from cluster.core.states import is_gone
from cluster.launch import state_file
from cluster.tracing.output_files import rotated_path

DEFAULT_LINES = 100
JOINED_RAY = Path("/tmp/ray")
"""Default folder of a Ray cluster that expertmesh has joined."""
_TICK_S = 0.25
_POLL_S = 0.5


def add_commands(commands: CommandParsers) -> None:
    parser = commands.add("logs", run, "show log lines of workers on any host, or of the launcher")
    text = "Name of a worker, or controller (default: the launcher)"
    parser.add_argument("worker", nargs="*", metavar="WORKER", help=text)
    parser.add_argument("--all", action="store_true", help="Show the controller and all workers")
    text = "Number of newest lines to show of each process"
    parser.add_argument("--tail", type=count_or_0, default=DEFAULT_LINES, help=text)
    parser.add_argument("--follow", action="store_true", help="Show new lines until interrupted")
    add_address_option(parser)
    add_served_model_option(parser)


def run(args: argparse.Namespace) -> int:
    """Print the newest log lines of the launcher, or of workers and the controller."""
    if not (args.worker or args.all):
        return _show_files(args, _launcher_file(args))
    try:
        with make_admin_client(args) as admin:
            return _show_processes(args, admin)
    except CommandError as err:
        if len(args.worker) != 1 or err.code in (ExitCode.UNAUTHORISED, ExitCode.FAILED):
            raise
        return _show_files(args, _worker_files(args))  # a lost worker, or no admin port


def _show_processes(args: argparse.Namespace, admin: AdminClient) -> int:
    """Print the newest log lines in the memory of each process, on any host."""
    seen: dict[str, int] = {}
    found = {}
    error: CommandError | None = None
    for name in _processes(args):
        try:
            seen[name], lines = admin.log(name, 0)
        except CommandError as err:
            if not args.all or err.code not in (ExitCode.REFUSED, ExitCode.NOT_READY):
                raise
            error = err
            note(f"expertmesh: {name}: {err}")  # it starts or has ended
        else:
            found[name] = _tail(lines, args.tail)
    if error is not None and not found and not args.follow:
        raise error
    _print(args, "process", found)
    trouble = ""
    while args.follow and not args.json:
        time.sleep(_POLL_S)
        last, trouble = trouble, _print_newer(args, admin, seen)
        if trouble not in ("", last):
            note(f"expertmesh: {trouble}; trying on")
    return ExitCode.OK


def _print_newer(args: argparse.Namespace, admin: AdminClient, seen: dict[str, int]) -> str:
    """Print the newer log lines of each process. Return the last error's text; empty if only
    processes that have ended did not answer. ``seen``: number of lines already shown."""
    try:
        names = _processes(args)
    except CommandError as err:
        return str(err)
    trouble = ""
    for name in names:
        try:
            seen[name], lines = _newer_lines(admin, name, seen.get(name, 0))
        except CommandError as err:
            trouble = trouble if err.code is ExitCode.REFUSED else str(err)
        else:
            _print_lines(lines)
    return trouble


def _newer_lines(admin: AdminClient, name: str, after: int) -> tuple[int, list[str]]:
    """Return the number of log lines of a process and those after line ``after``.

    Returns all lines if the process has fewer: it has restarted, and counts its lines anew.
    """
    number, lines = admin.log(name, after)
    return admin.log(name, 0) if number < after else (number, lines)


def _tail(lines: Sequence[str], count: int) -> Sequence[str]:
    return lines[-count:] if count > 0 else ()


def _print(args: argparse.Namespace, kind: str, found: Mapping[str, Sequence[str]]) -> None:
    """Print the log lines of each source; ``kind`` is ``process`` or ``file``."""
    if args.json:
        write_json({"schema": 1, "logs": [{kind: name, "lines": found[name]} for name in found]})
        return
    for name, lines in found.items():
        write_result(f"==> {name} <==\n" if len(found) > 1 or args.all else "")
        _print_lines(lines)


def _print_lines(lines: Iterable[str]) -> None:
    write_result("".join(f"{line}\n" for line in lines))


def _processes(args: argparse.Namespace) -> list[str]:
    """Return the process names of the command line, or with ``--all`` all running processes."""
    if not args.all:
        return list(args.worker)
    workers = Client(args).get("/cluster/v1/status")["workers"]
    return ["controller", *(w["name"] for w in workers if not is_gone(w["state"]))]


def _show_files(args: argparse.Namespace, files: Mapping[Path, str]) -> int:
    """Print log files. ``files``: path -> text of the file's rotated predecessor."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(FollowedFile(path)) for path in files]
        texts = {str(p): files[p] + file.read() for p, file in zip(files, opened, strict=True)}
        _print(args, "file", {p: _tail(t.splitlines(), args.tail) for p, t in texts.items()})
        if args.follow and not args.json:
            for more in follow_files(opened):
                write_result(more)
    return ExitCode.OK


def follow_files(
    files: Sequence[FollowedFile], sleep: Callable[[float], None] = time.sleep
) -> Iterator[str]:
    """Yield text as it is appended to the files. Never returns."""
    while True:
        sleep(_TICK_S)
        for file in files:
            if more := file.read():
                yield more


def _launcher_file(args: argparse.Namespace) -> dict[Path, str]:
    given = args.name or os.environ.get("EXPERTMESH_NAME")
    path = state_file.log_path(given or state_file.DEFAULT_NAME)
    if not path.exists():  # also true for a cluster that has ended
        record = find_record(args)
        if record is None:
            message = f"no cluster called {state_file.DEFAULT_NAME} was started on this host"
            raise CommandError(ExitCode.UNREACHABLE, message)
        path = state_file.log_path(record.name)
    return {path: _text(rotated_path(path))}


def _worker_files(args: argparse.Namespace) -> dict[Path, str]:
    """Return a worker's log files: path -> text of the file's rotated predecessor.

    Raises ``CommandError`` for a worker that is unknown or on another host.
    """
    status = Client(args).get("/cluster/v1/status")
    require_full_status(status, "the processes of workers")
    workers: list[Mapping[str, Any]] = status["workers"]
    (name,) = args.worker
    found = [w for w in workers if w["name"] == name]
    if not found:
        names = ", ".join(w["name"] for w in workers)
        raise CommandError(ExitCode.REFUSED, f"there is no {name}, but {names}")
    folders = [Path(r.temp_dir) / "ray" for r in state_file.all_records() if r.temp_dir]
    pid, node = found[0]["pid"], str(found[0]["node"])
    files = [
        path
        for folder in (() if _is_elsewhere(node) else (*folders, JOINED_RAY))
        for suffix in (".err", ".out")
        for path in sorted(folder.glob(f"session_latest/logs/worker-*-{pid}{suffix}"))
    ]
    if not files:
        rule = f"run this there, or: ray logs worker-*-{pid}.err --node-ip {node}"
        message = f"{name} writes its log on {node}: {rule}"
        raise CommandError(ExitCode.REFUSED, message)
    return {path: _text(rotated_path(path)) for path in files}


def _is_elsewhere(node: str) -> bool:
    """Whether ``node`` is an IP address of another host, where a pid is another process's."""
    try:
        is_ipv6 = ipaddress.ip_address(node).version == 6
    except ValueError:
        return False
    with socket.socket(socket.AF_INET6 if is_ipv6 else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((node, 0))
        except OSError:
            return True
    return False


def _text(path: Path) -> str:
    """Return all text of a file; empty if the file does not exist."""
    with FollowedFile(path) as file:
        return file.read()
