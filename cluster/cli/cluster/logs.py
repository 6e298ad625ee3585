"""``logs``: what a worker of this host has written, or the launcher of a cluster."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.cli.terminal.arguments import Commands
from cluster.cli.terminal.client import Client
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import out, out_json
from cluster.launch import state_file

DEFAULT_LINES = 100
JOINED_RAY = Path("/tmp/ray")
"""Default folder of a Ray that we have joined."""
_TICK_S = 0.25


def add_commands(commands: Commands) -> None:
    parser = commands.add("logs", run, "what a worker of this host, or the launcher, has written")
    parser.add_argument(
        "worker", nargs="?", metavar="WORKER", help="as in workers (default: the launcher)"
    )
    parser.add_argument("--tail", type=int, default=DEFAULT_LINES, help="lines")
    parser.add_argument("--follow", action="store_true", help="go on until interrupted")


def run(args: argparse.Namespace) -> int:
    """Print the last lines."""
    files = _worker_files(args) if args.worker else _launcher_file(args)
    texts = {path: path.read_text(errors="replace") for path in files}
    lines = {path: text.splitlines()[-args.tail :] for path, text in texts.items()}
    if args.json:
        logs = [{"file": str(path), "lines": found} for path, found in lines.items()]
        out_json({"schema": 1, "logs": logs})
        return ExitCode.OK
    for path, found in lines.items():
        out(f"==> {path} <==\n" if len(lines) > 1 else "")
        out("".join(f"{line}\n" for line in found))
    if args.follow:
        for more in appended({path: len(text.encode()) for path, text in texts.items()}):
            out(more)
    return ExitCode.OK


def appended(sizes: dict[Path, int], sleep: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """Text added to files after these sizes in bytes, without end."""
    while True:
        sleep(_TICK_S)
        for path, size in sizes.items():
            with path.open("rb") as file:
                file.seek(size)
                more = file.read()
            sizes[path] += len(more)
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
    found = [w for w in workers if w["name"] == args.worker]
    if not found:
        names = ", ".join(w["name"] for w in workers)
        raise CommandError(ExitCode.REFUSED, f"there is no {args.worker}, but {names}")
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
        message = f"{args.worker} writes on {found[0]['node']}: {rule}"
        raise CommandError(ExitCode.REFUSED, message)
    return files
