"""Waits for operations of a running cluster and prints them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any

from cluster.cli.terminal.admin_client import AdminClient
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import note, show
from cluster.cli.terminal.progress import Progress

POLL_S = 0.1


def follow_operation(
    args: argparse.Namespace, admin: AdminClient, operation: dict[str, Any], wait_s: float
) -> int:
    """Show the phases of an operation until it ends; return the exit code.

    ``wait_s``: time limit in seconds; 0 shows only the state. Raises ``CommandError`` if the
    operation has not ended after ``wait_s``.
    """
    give_up = time.monotonic() + wait_s
    phase = ""
    with Progress(lines=False) as progress:
        while operation["state"] == "RUNNING" and wait_s:
            text = f"{operation['id']} {operation['target']}: {operation['phase']}"
            if operation["phase"] != phase:
                phase = operation["phase"]
                progress.clear()
                note(text)
            progress.update(text)
            if time.monotonic() > give_up:
                late = f"{operation['id']} has not ended within {wait_s:g} s"
                more = f"expertmesh operations wait {operation['id']}"
                raise CommandError(ExitCode.NOT_READY, f"{late}: {more}")
            time.sleep(POLL_S)
            operation = admin.operation(operation["id"])
    return show_operation(args, operation)


def show_operation(args: argparse.Namespace, operation: dict[str, Any]) -> int:
    show(args, {"schema": 1, **operation}, _text(operation))
    ended_well = operation["state"] in ("RUNNING", "SUCCEEDED")
    return ExitCode.OK if ended_well else ExitCode.FAILED


def _text(operation: Mapping[str, Any]) -> str:
    """Format ``drain-1.1 SUCCEEDED: attention-1 is drained (3 requests moved, 0.4 s)``."""
    words = operation["message"] or f"{operation['target']}: {operation['phase']}"
    text = f"{operation['id']} {operation['state']}: {words}"
    if operation["state"] != "SUCCEEDED":
        return text
    took = f"{operation['ended'] - operation['started']:.1f} s"
    result = operation.get(operation["kind"], {})
    moved, copied = result.get("requests_moved", 0), result.get("experts_copied", 0)
    facts = [f"{moved} request{'s' * (moved > 1)} moved"] if moved else []
    facts += [f"{copied} expert{'s' * (copied > 1)} copied"] if copied else []
    return f"{text} ({', '.join([*facts, took])})"
