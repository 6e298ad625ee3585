"""Where a running cluster is written down: ``$XDG_STATE_HOME/expertmesh/<name>.json``.

The file is made before the first process is started and removed after the last one ended, so that
a later command finds the cluster, and a later start cleans up after a killed one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.errors import ConfigError
from cluster.orphans import host_id, sweep
from cluster.process import ProcessIdentity, is_running

SCHEMA = 1
DEFAULT_NAME = "default"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Command = Literal["serve", "up"]
RecordState = Literal["starting", "ready"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterRecord:
    """One cluster that was started on this host."""

    name: str
    """Name of the file."""
    command: Command
    """``serve`` ends with its front process, ``up`` does not."""
    state: RecordState
    """``ready`` once clients can call it."""
    launcher: ProcessIdentity
    """Process that owns everything the cluster consists of."""
    asked: dict[str, str]
    """What it was started with, by flag, so that a second ``up`` can tell."""
    http: str
    """URL of the HTTP port."""
    grpc: str
    """``host:port`` of the gRPC port."""
    address: str
    """Ray's address; empty until Ray runs."""
    joined: bool
    """Ray was there before and stays."""
    temp_dir: str
    """Folder of the private Ray; empty when joined."""
    host: str
    """Host and process table that the pids belong to."""
    processes: tuple[ProcessIdentity, ...] = ()
    """What the launcher started on this host."""

    @property
    def is_alive(self) -> bool:
        """Whether its launcher runs here; False for a record of another host."""
        return self.host == host_id() and is_running(self.launcher)

    @property
    def is_on_its_own(self) -> bool:
        """It was started by ``up`` in a Ray that was there before: nothing on this host owns it."""
        return self.joined and self.command == "up" and self.state == "ready"

    def to_dict(self) -> dict[str, Any]:
        """The file's content: the fields, and what people and scripts look for first."""
        ports = {"http": _port(self.http), "grpc": _port(self.grpc)}
        pids = {"launcher": self.launcher.pid, "others": [p.pid for p in self.processes]}
        return {"schema": SCHEMA, **asdict(self), "ports": ports, "pids": pids}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ClusterRecord:
        """Inverse of ``to_dict``. Raises ``KeyError``, ``TypeError`` or ``ValueError``."""
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']}")
        known = {k: v for k, v in data.items() if k not in ("schema", "ports", "pids")}
        known["launcher"] = ProcessIdentity(**known["launcher"])
        known["processes"] = tuple(ProcessIdentity(**p) for p in known["processes"])
        return cls(**known)


def _port(address: str) -> int:
    return int(address.rsplit(":", 1)[1])


def state_dir() -> Path:
    """Folder of all records, made when missing."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    folder = Path(base) / "expertmesh"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def record_path(name: str) -> Path:
    """File of a cluster. Raises ``ConfigError`` on a name that is no file name."""
    if not _NAME.fullmatch(name):
        raise ConfigError("name", name, "must be letters, digits, dot, dash or underscore")
    return state_dir() / f"{name}.json"


def log_path(name: str) -> Path:
    """What the launcher of a cluster writes on stderr; kept for one start."""
    return record_path(name).with_suffix(".log")


def write_record(record: ClusterRecord) -> None:
    """Write the record whole or not at all, readable by its owner only."""
    path = record_path(record.name)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.touch(mode=0o600)
    draft.write_text(json.dumps(record.to_dict(), indent=1) + "\n")
    draft.replace(path)


def read_record(name: str) -> ClusterRecord | None:
    """The record of that name; None when there is none that can be read."""
    try:
        return ClusterRecord.from_dict(json.loads(record_path(name).read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove_record(name: str) -> None:
    """Forget a cluster."""
    record_path(name).unlink(missing_ok=True)


def all_records() -> Iterator[ClusterRecord]:
    """Every record that can be read, by name."""
    for path in sorted(state_dir().glob("*.json")):
        record = read_record(path.stem)
        if record is not None:
            yield record


def clean_up_dead() -> list[str]:
    """End and remove what killed launchers left behind; one line of text for each cluster."""
    lines = []
    for record in all_records():
        if record.is_alive or record.joined or record.host != host_id():
            continue
        ended = sweep(Path(record.temp_dir), record.processes) if record.temp_dir else 0
        remove_record(record.name)
        log_path(record.name).unlink(missing_ok=True)
        lines.append(f"cleaned up after {record.name}: {ended} processes left by a killed start")
    return lines
