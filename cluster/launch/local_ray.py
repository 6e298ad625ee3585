"""Starts and ends a private Ray, without effect on other Ray clusters.

``ray.init(address="local")`` runs in the launcher: the kernel ends gcs, raylet and monitor with the
launcher, and then the raylet's workers end. Two agents survive the raylet and are found by their
open files.
"""

from __future__ import annotations

import gc
import logging
import os
import secrets
import socket
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.core.addresses import split_address
from cluster.core.errors import StartError, first_line
from cluster.core.fleets import NAMESPACE
from cluster.core.process import ProcessIdentity
from cluster.disk.files import replace_file
from cluster.launch.orphans import end_all, end_private_ray, find_by_files
from cluster.tracing.output_files import LIMIT_VARIABLE, MAX_BYTES

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 128 * 1024 * 1024
"""Size in bytes of Ray's object store, which holds no tensors. The minimum that works is 75 MiB."""
START_ATTEMPTS = 3
_SYSTEM_CONFIG = {
    "worker_niceness": 0,
    "task_events_report_interval_ms": 0,
    "maximum_gcs_destroyed_actor_cached_count": 64,
    "maximum_gcs_dead_worker_cached_count": 64,
}
"""Settings of Ray's processes. Ray's default niceness of workers is 15, so that other load on this
host would delay heartbeats. Ray also records every call of an actor by default: its gcs grew by 17%
in half an hour of traffic (``tests/long/soak.py``), and expertmesh does not read these records. Ray
keeps 100,000 actors and 1,000 processes that have ended, of which expertmesh reads only the newest.
"""
_ALLOCATOR = {
    "RAY_JEMALLOC_PROFILE": "raylet",
    "RAY_JEMALLOC_CONF": "narenas:1,tcache:false",
    "MALLOC_ARENA_MAX": "1",
}
"""Environment variables that limit the caches of memory allocators. The raylet's 29 threads each
keep freed memory in caches of 8 arenas: 12 MiB that grow for hours, with 1.4 MiB in use. One arena
without caches holds a constant 7 MiB (soak test). The arenas of glibc, one for each of a process's
first threads, fragment too.
"""
_SLOW_STARTS = ("timed out during startup", "Timed out waiting for file")
"""Parts of Ray's error messages about a node or a gcs that took too long to start."""
_END_LIMIT_S = 10.0
_CONNECT_LIMIT_S = 5.0
_CONNECT_RETRY_S = 0.5
_SOCKET_PATH_LIMIT = 107
_RAY_PATH_CHARS = 75
"""Number of characters of Ray's longest socket path that follow the path of Ray's folder."""


def make_temp_dir() -> Path:
    """Create a folder for one private Ray, readable by this user only, with short socket paths.

    Ray makes its own folder readable by every user, therefore Ray gets the folder ``ray`` inside
    the created folder.
    """
    return Path(tempfile.mkdtemp(prefix="em-", dir=temp_base()))


def temp_base() -> str:
    """Return the folder in which ``make_temp_dir`` creates folders. Raises ``StartError``."""
    for base in (tempfile.gettempdir(), "/tmp"):
        if os.access(base, os.W_OK) and len(base) + _RAY_PATH_CHARS < _SOCKET_PATH_LIMIT:
            return base
    raise StartError("ray", f"no writable folder with a short path (tried TMPDIR and {base})")


def private_environment(folder: Path) -> dict[str, str]:
    """Return the environment of a launcher with a private Ray; write the token that Ray requires.

    Ray reads the environment on import, so the variables must be set before the process starts.
    """
    token = folder / "token"
    replace_file(token, secrets.token_hex(32).encode(), mode=0o600)
    inherited = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_NAMESPACE", "RAY_TMPDIR")
    }
    return {
        **inherited,
        **common_environment(),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        # keeps node and workers on 127.0.0.1 as on Windows and macOS, where 0 is the default;
        # otherwise Ray replaces a loopback address by the host's own
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def common_environment() -> dict[str, str]:
    """Return the environment variables of every launcher, with a private or a joined Ray."""
    source = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    return {
        **{f"RAY_{name}": str(value) for name, value in _SYSTEM_CONFIG.items()},
        **_ALLOCATOR,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{source}{os.pathsep}{path}" if path else source,
        "PYTHONUNBUFFERED": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray's log monitor (``log_to_driver``) is not used, but kept up to 200 files of ended
        # workers open: four more with every scale-up and scale-down
        "RAY_LOG_MONITOR_MAX_OPEN_FILES": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        # Ray's own files would grow without limit: it writes statistics there every minute
        "RAY_ROTATION_BACKUP_COUNT": "1",
        LIMIT_VARIABLE: os.environ.get(LIMIT_VARIABLE, str(MAX_BYTES)),
        # Serve ends a proxy that is not ready in time, and itself with it: the default of five
        # seconds is too short on busy cores
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        # Serve skipped a replica with a warning if its loop was busy for 0.1 s, as at its start
        "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1",
        # the gateway runs in its replica's event loop: with two loops, gRPC wakes both for each
        # event
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivateRay:
    """Private Ray of one cluster, run by this process and its children on the loopback
    interface."""

    folder: Path
    """Folder of the private Ray, made by ``make_temp_dir``; ``stop`` removes the folder."""

    def start(self, num_cpus: int, num_gpus: int | None) -> str:
        """Start Ray, connect to it and return its address.

        Call on the main thread, which must stay alive: the kernel ends Ray's processes with the
        thread that started them.
        """
        context = init_ray(
            self.folder / "ray",
            namespace=NAMESPACE,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.WARNING,
            _node_ip_address="127.0.0.1",
        )
        return str(context.address_info["gcs_address"])

    def processes(self) -> list[ProcessIdentity]:
        """Return the running processes of this Ray."""
        return find_by_files(self.folder)

    def stop(self) -> None:
        """End Ray with all its actors, and remove its folder."""
        import ray

        ray.shutdown()
        end_private_ray(self.folder, ())


def init_ray(folder: Path, **options: Any) -> Any:
    """Call ``ray.init`` for a new Ray with its files in ``folder``; return its context.

    Ray gives its node 30 s to start, which no setting changes and a busy host may exceed. Ray also
    forks with Python code in the child, which may deadlock on locks of other threads. A failed
    attempt is cleaned up and retried.
    """
    import ray

    for attempts_left in reversed(range(START_ATTEMPTS)):
        try:
            return ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                _temp_dir=str(folder),
                _system_config=dict(_SYSTEM_CONFIG),  # Ray adds to it
                **options,
            )
        except Exception as err:  # the type that Ray raises
            if not attempts_left or not any(reason in str(err) for reason in _SLOW_STARTS):
                raise
            logger.warning("Ray did not start in time, starting it again: %s", err)
            end_all(find_by_files(folder), _END_LIMIT_S)
            _release_processes(err)
    raise AssertionError("the last attempt returns or raises")


def _release_processes(err: Exception) -> None:
    """Reap ended processes of Ray, to which the traceback of ``err`` keeps references."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        err.__traceback__ = None
        gc.collect()


def join_ray(
    address: str, patience_s: float = 0.0, sleep: Callable[[float], None] = time.sleep
) -> str:
    """Connect to an existing Ray and return its address.

    Raises ``ConnectionError`` if nothing listens at ``address`` for ``patience_s`` seconds, or if
    Ray refuses the connection.
    """
    import ray

    _wait_for_port(address, time.monotonic() + patience_s, sleep)
    try:
        context: Any = ray.init(
            address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING
        )
    except (ConnectionError, RuntimeError, ValueError) as err:
        raise ConnectionError(first_line(err)) from err
    return str(context.address_info["gcs_address"])


def _wait_for_port(address: str, deadline: float, sleep: Callable[[float], None]) -> None:
    """Wait until the address accepts connections, because Ray itself would retry for minutes."""
    if "/" in address or not address.rpartition(":")[2].isdigit():
        return  # auto: Ray finds its address by its processes
    while True:
        try:
            socket.create_connection(split_address(address), _CONNECT_LIMIT_S).close()
            return
        except UnicodeError as err:  # a part of the host's name is empty or too long
            raise ConnectionError(first_line(err)) from err
        except OSError as err:
            if time.monotonic() >= deadline:
                raise ConnectionError(f"{err.strerror or err}") from err
        sleep(_CONNECT_RETRY_S)
