"""A disk that is full under a running server: streams go on, the status says it, and no longer once
there is room. And the files of a server that logs much have a bounded size.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from benchmarks.harness.server import GOOD, WAIT_S, Served, command, environment, running_server
from benchmarks.harness.stalls import wait_until

pytestmark = pytest.mark.ray

DISK_BYTES = 96 << 20
LIMIT = 20_000
NUM_REQUESTS = 200
NUM_STREAMS, NUM_TOKENS = 8, 64
_MOUNT = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder with a short path, for a disk that a server mounts there, for itself alone."""
    folder = Path(tempfile.mkdtemp(prefix="d", dir="/var/tmp"))
    yield folder
    shutil.rmtree(folder)


def own_disk(folder: Path) -> list[str]:
    """The command before that of a server whose processes see a small disk in ``folder``."""
    alone = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    if subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount a disk of its own")
    return [*alone, "sh", "-c", _MOUNT, "sh", str(DISK_BYTES), str(folder)]


def stream(server: Served) -> str:
    """Why the one choice of a stream has ended."""
    body = {**GOOD, "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(base_url=server.http, timeout=WAIT_S) as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        *_, last, done = [line for line in answer.iter_lines() if line]
    assert done == "data: [DONE]"
    return str(json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"])


def streams(server: Served) -> list[str]:
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        return list(pool.map(lambda _: stream(server), range(NUM_STREAMS)))


def fill(path: Path) -> None:
    """Write until there is no room."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(b"\0" * (1 << 20)):
            pass
    assert os.statvfs(path).f_bavail == 0


def said(server: Served, folder: Path) -> list[str]:
    """What the status says of the disk."""
    return [p for p in server.status()["problems"] if f"the disk of {folder}" in p]


def test_a_full_disk_is_said_and_stops_no_stream(tmp_path: Path, disk: Path) -> None:
    before, variables = own_disk(disk), {"TMPDIR": str(disk)}
    with running_server(tmp_path, before=before, variables=variables) as server:
        pids = {w["name"]: w["pid"] for w in server.status()["workers"]}
        seen = Path(f"/proc/{pids['expert-0']}/root") / disk.relative_to("/")
        assert said(server, disk) == []
        fill(seen / "filling")
        assert streams(server) == ["length"] * NUM_STREAMS
        wait_until(lambda: said(server, disk), "the status to say that the disk is full")
        (problem,) = said(server, disk)
        assert problem.endswith("is nearly full: 0 MiB are free")
        words = command("status", "--url", server.http)
        shown = subprocess.run(
            words, env=environment(tmp_path), capture_output=True, text=True, check=False
        )
        assert problem in shown.stdout, shown.stderr
        assert streams(server) == ["length"] * NUM_STREAMS
        (seen / "filling").unlink()
        wait_until(lambda: not said(server, disk), "the status to say nothing of the disk")
        assert {w["name"]: w["pid"] for w in server.status()["workers"]} == pids
        assert streams(server) == ["length"] * NUM_STREAMS


@pytest.mark.slow
def test_files_of_a_server_that_logs_much_have_a_bounded_size(tmp_path: Path) -> None:
    """Each request leaves a line in a gateway's file, a request of Serve's own beside it."""
    trace = tmp_path / "timelines"
    words = ("--trace-dir", str(trace), "--trace-max-bytes", str(LIMIT))
    variables = {"RAY_ROTATION_MAX_BYTES": str(LIMIT)}
    with running_server(tmp_path, *words, variables=variables) as server:
        for _ in range(NUM_REQUESTS):
            server.complete(**{**GOOD, "max_tokens": 1})
        logs = server.folder / "ray" / "session_latest" / "logs"
        found = [path for path in logs.rglob("*") if path.suffix in (".err", ".out", ".log")]
        assert [path for path in found if path.match("worker-*.1.err")], "a gateway's"
        sizes = {str(path): path.stat().st_size for path in found}
        timelines = [path.stat().st_size for path in trace.iterdir()]
    assert max(sizes.values()) < 2 * LIMIT, sizes
    assert len(timelines) == 2 * 3
    assert max(timelines) < 4 * LIMIT
