"""Reads and writes the record of a cluster: ``$XDG_STATE_HOME/expertmesh/<name>.json``.

The file is written before the first process starts and removed after the last one has ended, so
that a later command finds the cluster, and a later start cleans up after a killed one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.core.addresses import split_address
from cluster.core.codec import from_plain
from cluster.core.errors import ConfigError, ProtocolError
from cluster.core.process import ProcessIdentity, is_running
from cluster.disk.files import replace_file
from cluster.launch.orphans import end_private_ray, host_id
from cluster.tracing.output_files import rotated_path

DEFAULT_NAME = "default"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Command = Literal["serve", "up"]
RecordState = Literal["starting", "ready"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterRecord:
    """Record of a cluster that was started on this host."""

    name: str
    """Name of the cluster and of its state file."""
    command: Command
    """Command that started the cluster. After ``serve``, the cluster ends with the CLI process."""
    state: RecordState
    """State of the start: ``starting``, or ``ready`` once clients can call the cluster."""
    launcher: ProcessIdentity
    """Process that owns the cluster."""
    asked: dict[str, str]
    """The user's options by flag, which a second ``up`` compares with its own options."""
    http: str
    """URL of the gateway's HTTP port."""
    grpc: str
    """Address ``host:port`` of the gateway's gRPC port."""
    address: str
    """Ray's address; empty until Ray runs."""
    joined: bool
    """Whether Ray existed before the cluster and keeps running after the cluster ends."""
    temp_dir: str
    """Folder of the private Ray; empty for a joined Ray."""
    host: str
    """Id of the host and process table in which the recorded pids are valid (``host_id``)."""
    processes: tuple[ProcessIdentity, ...] = ()
    """Processes that the launcher started on this host."""
    schema: Literal[1] = 1
    """Version of the state file's format."""

    def __str__(self) -> str:
        return f"{self.name} ({self.http})"

    @property
    def is_alive(self) -> bool:
        """Whether the cluster's launcher runs on this host; False for a record of another host."""
        return self.host == host_id() and is_running(self.launcher)

    @property
    def is_detached(self) -> bool:
        """Whether ``up`` started the cluster in a joined Ray, so that no process here owns it."""
        return self.joined and self.command == "up" and self.state == "ready"

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the state file: all fields, and the ports and pids separately."""
        ports = {"http": split_address(self.http)[1], "grpc": split_address(self.grpc)[1]}
        pids = {"launcher": self.launcher.pid, "others": [p.pid for p in self.processes]}
        return {**asdict(self), "ports": ports, "pids": pids}


def state_dir() -> Path:
    """Return the folder of all records; create it if it does not exist.

    Raises ``ConfigError`` if the folder cannot be created.
    """
    folder = _folder()
    try:
        _make(folder)
    except OSError as err:
        rule = f"must be a folder that can be written: {err.strerror}"
        raise ConfigError("XDG_STATE_HOME", str(folder.parent), rule) from err
    return folder


def _folder() -> Path:
    """Return the folder of all records, which may not exist.

    Raises ``ConfigError`` for a user without a home folder.
    """
    if base := os.environ.get("XDG_STATE_HOME"):
        return Path(base) / "expertmesh"
    try:
        return Path.home() / ".local" / "state" / "expertmesh"
    except RuntimeError as err:
        rule = "must be set, as this user has no home folder"
        raise ConfigError("XDG_STATE_HOME", "", rule) from err


def _make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def record_path(name: str) -> Path:
    """Return the path of a cluster's record.

    Raises ``ConfigError`` if ``name`` is no valid file name, or the folder cannot be created.
    """
    path = _path(name)
    state_dir()
    return path


def _path(name: str) -> Path:
    """Return the path of a cluster's record, whose folder may not exist."""
    if not _NAME.fullmatch(name):
        raise ConfigError("name", name, "must be letters, digits, dot, dash or underscore")
    return _folder() / f"{name}.json"


def log_path(name: str) -> Path:
    """Return the path of the log of a cluster's launcher; the next start overwrites the log."""
    return record_path(name).with_suffix(".log")


def remove_log(name: str) -> None:
    """Remove the launcher's log and its rotated files."""
    for path in (log_path(name), rotated_path(log_path(name))):
        path.unlink(missing_ok=True)


def write_record(record: ClusterRecord) -> None:
    """Write the record, readable by its owner only. Raises ``OSError`` and keeps the old file."""
    text = json.dumps(record.to_dict(), indent=1) + "\n"
    path = _path(record.name)
    _make(path.parent)
    replace_file(path, text.encode(), mode=0o600)


def read_record(name: str) -> ClusterRecord | None:
    """Read the record of the cluster ``name``; None if there is no readable record."""
    try:
        return from_plain(json.loads(_path(name).read_text()), ClusterRecord)
    except (OSError, ValueError, RecursionError, ProtocolError):
        return None


def remove_record(name: str) -> None:
    """Remove the record of a cluster."""
    _path(name).unlink(missing_ok=True)


def all_records() -> Iterator[ClusterRecord]:
    """Yield all readable records, sorted by name; none if their folder cannot be made."""
    try:
        folder = _folder()
    except ConfigError:
        return
    for path in sorted(folder.glob("*.json")):
        if not _NAME.fullmatch(path.stem):
            continue  # of another program, such as an editor's lock
        record = read_record(path.stem)
        if record is not None:
            yield record


def running_records() -> list[ClusterRecord]:
    """Return the records of running clusters, sorted by name."""
    return [r for r in all_records() if r.is_alive or r.is_detached]


def clean_up_dead() -> list[str]:
    """Clean up after killed launchers of this host; return one line of text for each cluster.

    Remaining processes of private Rays are killed; records and logs are removed.
    """
    lines = []
    for record in all_records():
        if record.is_alive or record.joined or record.host != host_id():
            continue
        ended = end_private_ray(Path(record.temp_dir), record.processes) if record.temp_dir else 0
        remove_record(record.name)
        remove_log(record.name)
        lines.append(f"cleaned up after {record.name}: {ended} processes left by a killed start")
    return lines
