"""The web page in a real browser, against ``expertmesh serve``: what it shows, and its costs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.harness.server import Served, running_server
from benchmarks.harness.stalls import wait_until
from tests.gateway.stack import Stack
from tests.harness.clients import node_modules

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROGRAM = Path(__file__).parent / "clients" / "use_dashboard.mjs"
LIMIT_S = 1500.0
MOST_MS = 2000
"""From the kill of a worker until the page shows it."""
MOST_LOST = 400
"""Requests that a killed gateway had counted since its last sample, on a fast machine."""
NUM_UPDATES = 86_400
"""24 hours, at one a second."""
MOST_BYTES = 2 << 20
"""Growth of the heap, beside noise."""


class Browser:
    """The program, and the lines that it prints."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def step(self, name: str) -> dict[str, Any]:
        """The next line, which must be of this step."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the browser ended before {name!r}"
        found: dict[str, Any] = json.loads(line)
        assert found["step"] == name, found
        return found

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()


@contextmanager
def browser(folder: Path, *words: str) -> Iterator[Browser]:
    """The program at work; it must end well."""
    (folder / "node_modules").symlink_to(node_modules())
    program = folder / PROGRAM.name
    program.write_text(PROGRAM.read_text())
    process = subprocess.Popen(
        ["node", str(program), *words],
        cwd=folder,
        env={**os.environ, "LANG": "en_GB.UTF-8"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    timer = threading.Timer(LIMIT_S, process.kill)
    timer.start()
    try:
        yield Browser(process)
        assert process.wait(LIMIT_S) == 0
    finally:
        timer.cancel()
        process.kill()
        process.communicate()


@contextmanager
def load(server: Served) -> Iterator[None]:
    """One client that asks again and again."""
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            with contextlib.suppress(httpx.TransportError):  # the gateway starts again
                server.client.post("/v1/completions", json={"prompt": "ROMEO:", "max_tokens": 24})

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_tour_of_the_page(tmp_path: Path) -> None:
    """Charts that move, a prompt with its experts, a killed worker, an order, a phone."""
    node_modules()
    with (
        running_server(tmp_path, "--admin-port", "0", "--num-redundant-experts", "8") as server,
        load(server),
        browser(tmp_path, "tour", server.http, admin_url(server)) as page,
    ):
        tried = page.step("tried")
        assert tried["problem"] == ""
        assert tried["tokens"] == tried["prompt"] + 5
        layers = len(server.client.get("/cluster/v1/placement").json()["banks"])
        assert (tried["layers"], tried["hottest"]) == (layers, 8)
        assert "expert-" in tried["visited"]
        assert "log-probability" in tried["chosen"]
        assert tried["cell"].startswith("Expert 1 on expert-0")
        assert page.step("stopped")["problem"] == ""
        crowded = page.step("crowded")
        assert crowded["width"] == 320
        assert (crowded["twice"], crowded["cut"], crowded["keepsFocus"]) == ([], [], True)
        assert re.fullmatch(r" median 100 ms 95% 100 ms[\d:]{8}", crowded["ttft"])
        assert crowded["queue"] == " attention-0 3 sequences"
        assert crowded["scrolled"] > 0, "the cell that the keys chose is in view"
        (pid,) = (w["pid"] for w in server.status()["workers"] if w["name"] == "expert-1")
        os.kill(pid, signal.SIGKILL)
        page.tell("expert-1")
        killed = page.step("killed")
        assert killed["shown_ms"] <= MOST_MS
        assert "LOST" in killed["text"]
        wait_until(lambda: server.status()["state"] == "SERVING", "another worker", LIMIT_S)
        assert "SUCCEEDED" in page.step("ordered")["result"]
        restart_gateway(server)
        served = samples_of(server)
        page.tell("restarted")
        phone = page.step("phone")
        assert phone["width"] <= 390
        assert int(phone["samples"]) >= len(served), "a page that has just loaded draws them all"
        assert page.step("end")["errors"] == []


def restart_gateway(server: Served) -> None:
    """Kill the gateway; wait until another one shows the history and the totals of before."""
    before = server.client.get("/dashboard/api/state").json()
    (replica,) = before["status"]["gateway"]
    first, *others = samples_of(server)
    assert others, "one sample may be as new as the next gateway"
    os.kill(replica["pid"], signal.SIGKILL)

    def is_back() -> bool:
        with contextlib.suppress(httpx.TransportError):
            history = server.client.get("/dashboard/api/history")
            if history.is_success and history.json()["samples"]:
                return bool(history.json()["samples"][0] == first)
        return False

    wait_until(is_back, "the history of before", LIMIT_S)
    after = server.client.get("/dashboard/api/state").json()
    assert after["status"]["gateway"][0]["pid"] != replica["pid"]
    assert after["started"] == before["started"]
    totals = [state["counters"]["request_success_total"] for state in (before, after)]
    assert totals[1] >= totals[0] - MOST_LOST


def samples_of(server: Served) -> list[Any]:
    """The history that the gateway has."""
    samples: list[Any] = server.client.get("/dashboard/api/history").json()["samples"]
    return samples


def admin_url(server: Served) -> str:
    (replica,) = server.status()["gateway"]
    return f"http://{replica['admin_http']}"


@pytest.mark.timeout(LIMIT_S + 60)
def test_a_day_of_updates_leaves_nothing_behind(stack: Stack, tmp_path: Path) -> None:
    with browser(tmp_path, "endure", stack.url, str(NUM_UPDATES)) as page:
        endured = page.step("endured")
        before, after = endured["before"], endured["after"]
        assert after["updates"] >= NUM_UPDATES > before["updates"]
        assert after["bytes"] < before["bytes"] + MOST_BYTES
        assert after["nodes"] <= before["nodes"] + 100, "a table of events may still fill"
        assert page.step("end")["errors"] == []
