"""``down``: stop a cluster that ``up`` or ``serve`` started."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from cluster.cli.terminal.arguments import CommandParsers, seconds
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import note, write_json
from cluster.cli.terminal.progress import Progress
from cluster.cli.terminal.stdin import is_terminal
from cluster.core.process import is_running, kill_process
from cluster.launch import local_ray, state_file
from cluster.launch.orphans import end_private_ray
from cluster.launch.teardown import UNREACHABLE

STOP_LIMIT_S = 15.0
_POLL_S = 0.1
_END_LIMIT_S = 120.0


def add_commands(commands: CommandParsers) -> None:
    parser = commands.add("down", run, "stop a cluster that up or serve started")
    parser.add_argument("-y", "--yes", action="store_true", help="Do not ask for confirmation")
    text = "Time that the cluster has to stop; after it, its processes are killed"
    parser.add_argument("--wait", type=seconds, default=STOP_LIMIT_S, metavar="SECONDS", help=text)
    text = "Address of a Ray cluster; stop the cluster in it, even if another host started it"
    parser.add_argument("--address", metavar="ADDRESS", help=text)


def run(args: argparse.Namespace) -> int:
    """Stop the cluster. The command also succeeds if no cluster runs."""
    name = args.name or os.environ.get("EXPERTMESH_NAME") or state_file.DEFAULT_NAME
    record = state_file.read_record(name)
    address = args.address or ("" if record else os.environ.get("RAY_ADDRESS", ""))
    if address:
        was_up = _end_in(args, address, record)
    elif record is None:
        was_up = False
        running = ", ".join(map(str, state_file.running_records()))
        others = f"; running: {running}; choose one with --name" if running else ""
        note(f"no cluster called {name} is up on this host{others}")
    else:
        was_up = True
        _confirm(args, f"{name} ({record.http})")
        end_cluster(record, args.wait)
        state_file.remove_log(name)
        note(f"{name} is down")
    if args.json:
        write_json({"schema": 1, "name": name, "was_up": was_up})
    return ExitCode.OK


def _end_in(
    args: argparse.Namespace, address: str, record: state_file.ClusterRecord | None
) -> bool:
    """Stop the cluster in the Ray at ``address``; return False if there was no cluster."""
    _confirm(args, f"the cluster in Ray at {address}")
    names = end_by_name(address)
    if record is not None and record.is_detached:
        state_file.remove_record(record.name)
    note(f"ended in Ray at {address}: {', '.join(names) or 'nothing'}")
    return bool(names)


def _confirm(args: argparse.Namespace, what: str) -> None:
    """Ask for confirmation on a terminal; scripts are not asked.

    Raises ``CommandError`` if the user does not confirm.
    """
    if args.yes or not is_terminal():
        return
    sys.stderr.write(f"end {what}? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise CommandError(ExitCode.REFUSED, "nothing was ended")


def end_cluster(record: state_file.ClusterRecord, limit_s: float) -> None:
    """Stop a cluster's launcher, wait for its end, and end processes that the launcher leaves.

    The launcher is killed after ``limit_s`` seconds. Raises ``CommandError``.
    """
    if record.is_alive:
        os.kill(record.launcher.pid, signal.SIGTERM)
        if not _wait_for_end(record, limit_s):
            note(f"{record.name} did not end in time: killing its launcher")
            kill_process(record.launcher)
    if state_file.read_record(record.name) is None:
        return
    if record.joined:
        try:
            end_by_name(record.address)
        except CommandError as err:
            if err.code != ExitCode.UNREACHABLE:
                raise
            note(f"{record.name} is removed from the records: {err}")
    elif record.temp_dir:
        end_private_ray(Path(record.temp_dir), record.processes)
    state_file.remove_record(record.name)


def _wait_for_end(record: state_file.ClusterRecord, limit_s: float) -> bool:
    """Wait for the end of the launcher; return whether it ended within ``limit_s`` seconds."""
    deadline = time.monotonic() + limit_s
    with Progress(lines=False) as progress:
        while is_running(record.launcher) and time.monotonic() < deadline:
            progress.update(f"ending {record.name}")
            time.sleep(_POLL_S)
    return not is_running(record.launcher)


def end_by_name(address: str) -> list[str]:
    """End expertmesh's Serve app and actors in a Ray; return the names of the actors.

    Runs in a child process that may import Ray. Raises ``CommandError``.
    """
    command = [sys.executable, "-m", "cluster.launch.teardown", address]
    environment = {**os.environ, **local_ray.common_environment()}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_END_LIMIT_S
        )
    except subprocess.TimeoutExpired as err:
        message = f"Ray at {address} does not respond within {_END_LIMIT_S:g} s"
        raise CommandError(ExitCode.NOT_READY, message) from err
    words = done.stderr.strip().splitlines() or ["no reason given"]
    if done.returncode == UNREACHABLE:
        raise CommandError(ExitCode.UNREACHABLE, f"no Ray at {address}: {words[-1]}")
    if done.returncode != 0:
        message = f"could not end the cluster in Ray at {address}: {words[-1]}"
        raise CommandError(ExitCode.FAILED, message)
    return done.stdout.split()
