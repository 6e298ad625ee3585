"""``down``: end a cluster that ``up`` (or ``serve``) started on this host."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cluster import local_ray, state_file
from cluster.cli.exit_codes import CommandError, ExitCode
from cluster.cli.terminal import note, out_json
from cluster.orphans import sweep
from cluster.process import is_running, kill_process

STOP_LIMIT_S = 15.0
_POLL_S = 0.1


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register ``down``."""
    parser = commands.add_parser("down", parents=[common], help="end a cluster on this host")
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """End it; nothing to end is no error."""
    name = args.name or os.environ.get("EXPERTMESH_NAME") or state_file.DEFAULT_NAME
    record = state_file.read_record(name)
    if record is None:
        note(f"no cluster called {name} is up on this host")
    elif not _may_end(args, record):
        raise CommandError(ExitCode.REFUSED, "nothing was ended")
    else:
        end_cluster(record, args.timeout or STOP_LIMIT_S)
        state_file.log_path(name).unlink(missing_ok=True)
        note(f"{name} is down")
    if args.json:
        out_json({"schema": 1, "name": name, "was_up": record is not None})
    return ExitCode.OK


def _may_end(args: argparse.Namespace, record: state_file.ClusterRecord) -> bool:
    """Ask on a terminal; a script has already decided."""
    if args.yes or not sys.stdin.isatty():
        return True
    sys.stderr.write(f"end {record.name} ({record.http})? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def end_cluster(record: state_file.ClusterRecord, limit_s: float) -> None:
    """Ask the launcher to stop, wait, and end what is left. Raises ``CommandError``."""
    if record.is_alive:
        os.kill(record.launcher.pid, signal.SIGTERM)
        deadline = time.monotonic() + limit_s
        while is_running(record.launcher):
            if time.monotonic() > deadline:
                note(f"{record.name} does not end by itself: killing it")
                kill_process(record.launcher)
                break
            time.sleep(_POLL_S)
    if state_file.read_record(record.name) is None:
        return
    if record.joined:
        _end_joined(record)
    elif record.temp_dir:
        sweep(Path(record.temp_dir), record.processes)
    state_file.remove_record(record.name)


def _end_joined(record: state_file.ClusterRecord) -> None:
    """Actors in a joined Ray outlive their launcher: end them by name, in a process that may."""
    command = [sys.executable, "-m", "cluster.end_joined", record.address]
    environment = {**os.environ, **local_ray.common_environment()}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60.0
        )
    except subprocess.TimeoutExpired as err:
        message = f"Ray at {record.address} does not answer"
        raise CommandError(ExitCode.NOT_READY, message) from err
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or ["no reason given"]
        raise CommandError(ExitCode.FAILED, f"ending {record.name} failed: {words[-1]}")
