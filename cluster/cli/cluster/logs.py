"""``logs``: what workers have logged, on any host, or the launcher of a cluster.

Processes that run keep their newest lines in memory, and the admin port or Ray fetches them. Of a
worker that has ended its files are read, on its host.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.cli.terminal.arguments import Commands, add_address_option
from cluster.cli.terminal.client import Client
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.orders import Orders, orders_for
from cluster.cli.terminal.output import out, out_json
from cluster.core.states import is_gone
from cluster.launch import state_file

DEFAULT_LINES = 100
JOINED_RAY = Path("/tmp/ray")
"""Default folder of a Ray that we have joined."""
_TICK_S = 0.25
_POLL_S = 0.5


def add_commands(commands: Commands) -> None:
    parser = commands.add("logs", run, "what workers of any host, or the launcher, have logged")
    parser.add_argument(
        "worker", nargs="*", metavar="WORKER", help="as in workers, or controller; none: launcher"
    )
    parser.add_argument("--all", action="store_true", help="the controller and all workers")
    parser.add_argument("--tail", type=int, default=DEFAULT_LINES, help="lines of each")
    parser.add_argument("--follow", action="store_true", help="go on until interrupted")
    add_address_option(parser)


def run(args: argparse.Namespace) -> int:
    """Print the last lines."""
    if not (args.worker or args.all):
        return _show_files(args, _launcher_file(args))
    try:
        with orders_for(args) as orders:
            return _show_processes(args, orders)
    except CommandError as err:
        if len(args.worker) != 1 or err.code is ExitCode.UNAUTHORISED:
            raise
        return _show_files(args, _worker_files(args))  # it is lost, or there is no admin port


def _show_processes(args: argparse.Namespace, orders: Orders) -> int:
    """The newest lines that each process has in its memory, wherever it runs."""
    seen: dict[str, int] = {}
    found = {}
    for name in _processes(args):
        seen[name], lines = orders.log(name, 0)
        found[name] = _last(lines, args.tail)
    _print(args, "process", found)
    while args.follow and not args.json:
        time.sleep(_POLL_S)
        for name in _processes(args):
            with contextlib.suppress(CommandError):  # it has just ended, or is slow
                seen[name], lines = orders.log(name, seen.get(name, 0))
                _print_lines(lines)
    return ExitCode.OK


def _last(lines: Sequence[str], count: int) -> Sequence[str]:
    return lines[-count:] if count > 0 else ()


def _print(args: argparse.Namespace, kind: str, found: Mapping[str, Sequence[str]]) -> None:
    """Lines by the name of their ``process`` or ``file``."""
    if args.json:
        out_json({"schema": 1, "logs": [{kind: name, "lines": found[name]} for name in found]})
        return
    for name, lines in found.items():
        out(f"==> {name} <==\n" if len(found) > 1 else "")
        _print_lines(lines)


def _print_lines(lines: Iterable[str]) -> None:
    out("".join(f"{line}\n" for line in lines))


def _processes(args: argparse.Namespace) -> list[str]:
    """The names that were given, or all that run now."""
    if not args.all:
        return list(args.worker)
    workers = Client(args).get("/cluster/v1/status")["workers"]
    return ["controller", *(w["name"] for w in workers if not is_gone(w["state"]))]


def _show_files(args: argparse.Namespace, files: list[Path]) -> int:
    texts = {path: path.read_text(errors="replace") for path in files}
    lines = {str(path): _last(text.splitlines(), args.tail) for path, text in texts.items()}
    _print(args, "file", lines)
    if args.follow and not args.json:
        for more in appended({path: len(text.encode()) for path, text in texts.items()}):
            out(more)
    return ExitCode.OK


def appended(sizes: dict[Path, int], sleep: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """Text added to files after these sizes in bytes, without end.

    A file that is shorter than it was is a new one: the old one was rotated.
    """
    while True:
        sleep(_TICK_S)
        for path, size in sizes.items():
            try:
                with path.open("rb") as file:
                    began = size if file.seek(0, os.SEEK_END) >= size else 0
                    file.seek(began)
                    more = file.read()
            except FileNotFoundError:
                continue  # the new one is about to come
            sizes[path] = began + len(more)
            if more:
                yield more.decode(errors="replace")


def _launcher_file(args: argparse.Namespace) -> list[Path]:
    names = [record.name for record in state_file.all_records()]
    only = names[0] if len(names) == 1 else state_file.DEFAULT_NAME
    name = args.name or os.environ.get("EXPERTMESH_NAME") or only
    path = state_file.log_path(name)
    if not path.exists():
        message = f"no cluster called {name} was started on this host"
        raise CommandError(ExitCode.UNREACHABLE, message)
    return [path]


def _worker_files(args: argparse.Namespace) -> list[Path]:
    """Raises ``CommandError`` for a worker that is unknown, or of another host."""
    workers: list[Mapping[str, Any]] = Client(args).get("/cluster/v1/status")["workers"]
    (name,) = args.worker
    found = [w for w in workers if w["name"] == name]
    if not found:
        names = ", ".join(w["name"] for w in workers)
        raise CommandError(ExitCode.REFUSED, f"there is no {name}, but {names}")
    folders = [Path(r.temp_dir) / "ray" for r in state_file.all_records() if r.temp_dir]
    pid = found[0]["pid"]
    files = [
        path
        for folder in (*folders, JOINED_RAY)
        for path in sorted(folder.glob(f"session_latest/logs/worker-*-{pid}.*"))
        if path.suffix in (".out", ".err")
    ]
    if not files:
        rule = f"ask there, or: ray logs worker-*-{pid}.err --node-ip {found[0]['node']}"
        message = f"{name} writes on {found[0]['node']}: {rule}"
        raise CommandError(ExitCode.REFUSED, message)
    return files
