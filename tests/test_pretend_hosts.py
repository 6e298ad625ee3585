"""One attention and two expert workers on three hosts, in network namespaces of this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.config import EngineSection
from cluster.model_source import bundled_checkpoint
from tests.fault_rows import FORMS, FULL, Form
from workers.local_engine import LocalEngine
from workers.request import SamplingParams

pytestmark = pytest.mark.ray

SCRIPT = Path(__file__).parent / "pretend_hosts" / "cluster.sh"
HEAD = "10.77.0.10"
PROMPT = "ROMEO:\nWhat light is this"
NUM_TOKENS = 24
TIMEOUT_S = 240.0
DETECTION_LIMIT_S = 4.0
NEEDED = ("unshare", "nsenter", "ip", "bridge")

CLIENT = """
import sys, urllib.request
body = sys.stdin.buffer.read() or None
headers = {"Content-Type": "application/json"}
request = urllib.request.Request(sys.argv[1], data=body, headers=headers)
sys.stdout.buffer.write(urllib.request.urlopen(request, timeout=240).read())
"""


STREAMER = """
import json, sys, threading, urllib.request
url, num_streams, num_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
lock = threading.Lock()
def read(i):
    body = {"prompt": f"ROMEO {i}:", "max_tokens": num_tokens, "temperature": i % 2, "seed": i,
            "ignore_eos": True, "stream": True, "return_token_ids": True}
    headers = {"Content-Type": "application/json"}
    data = json.dumps(body).encode()
    request = urllib.request.Request(url + "/v1/completions", data=data, headers=headers)
    for line in urllib.request.urlopen(request, timeout=100):
        if line.startswith(b"data: {"):
            with lock:
                print(i, line[6:].decode(), end="", flush=True)
threads = [threading.Thread(target=read, args=(i,)) for i in range(num_streams)]
for thread in threads:
    thread.start()
"""


def why_not() -> str:
    """Why there can be no pretend hosts here; empty if there can."""
    if os.geteuid() != 0:
        return "pretend hosts need root"
    missing = [name for name in NEEDED if shutil.which(name) is None]
    return f"pretend hosts need {', '.join(missing)}" if missing else ""


class Hosts:
    """Hosts that are namespaces of this machine; ``more`` is for their environment."""

    def __init__(self, state: Path, **more: str) -> None:
        self._env = os.environ | {
            "NETSIM_STATE": str(state),
            "NETSIM_PYBIN": str(Path(sys.executable).parent),
            "NETSIM_CPUS": "1",
            "XDG_STATE_HOME": str(state.parent / "home"),
            "OMP_NUM_THREADS": "1",
            **more,
        }

    def run(self, *words: str, text: str = "") -> str:
        """Run a command of the script; returns its stdout. Raises with stderr if it fails."""
        done = subprocess.run(
            ["bash", str(SCRIPT), *words],
            env=self._env,
            input=text,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def boots(self, host: str) -> bool:
        """Boot a host that was killed; False while the last of it is not gone."""
        try:
            self.run("boot", host)
        except AssertionError as err:
            if "is up" in str(err):
                return False
            raise
        return True

    def mute(self, host: str) -> None:
        """Drop all its frames from now on, without a sign to anybody."""
        self.run("mute", host)

    def power_off(self, host: str) -> None:
        """All its processes are gone, and no frame tells anybody."""
        self.run("poweroff", host)

    def boot(self, host: str) -> None:
        """It comes back, empty, and joins Ray again."""
        self.run("boot", host)
        self.run("ray-node", host)

    def start(self, host: str, *words: str, log: Path) -> subprocess.Popen[str]:
        """Start a program on a host, in a process group of its own."""
        with log.open("w") as errors:
            return subprocess.Popen(
                ["bash", str(SCRIPT), "exec", host, *words],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )

    def fetch(self, host: str, url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """An HTTP exchange made on a host."""
        text = json.dumps(body) if body is not None else ""
        answer = self.run("exec", host, sys.executable, "-c", CLIENT, url, text=text)
        parsed: dict[str, Any] = json.loads(answer)
        return parsed


@contextmanager
def three_hosts() -> Iterator[Hosts]:
    """With Ray on each."""
    if reason := why_not():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="em", dir="/tmp") as folder:
        made = Hosts(Path(folder) / "n")
        try:
            made.run("up", "3")
            made.run("ray")
            yield made
        finally:
            made.run("down")


@contextmanager
def served_on(hosts: Hosts, log: Path) -> Iterator[str]:
    """A served cluster with a worker on each host, where each expert has two copies; its URL."""
    words = ["-m", "cluster.cli.main", "serve", "--address", f"{HEAD}:6379", "--host", HEAD]
    words += ["--allow-unauthenticated", "--dtype", "float32", "--deterministic"]
    words += ["--num-redundant-experts", "64", "--detection-limit-s", f"{DETECTION_LIMIT_S:g}"]
    server = hosts.start("h0", sys.executable, *words, log=log)
    try:
        assert server.stdout is not None
        ready = server.stdout.readline()
        assert ready.startswith("expertmesh ready http="), log.read_text()
        yield ready.split("http=")[1].split()[0]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.communicate(timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with three_hosts() as hosts:
        yield hosts


@pytest.fixture(scope="module")
def url(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served_on(hosts, tmp_path_factory.mktemp("served") / "serve.log") as url:
        yield url


@dataclass(slots=True)
class Streams:
    """What the clients of a run got, by stream."""

    tokens: dict[int, list[int]]
    reasons: dict[int, str]
    longest_gap_s: float = 0.0
    """Longest time in which one stream had no news."""


def stream(hosts: Hosts, url: str, log: Path, form: Form, then: Callable[[], None]) -> Streams:
    """Serve streams to clients on the head's host; ``then`` is called under way."""
    words = [sys.executable, "-c", STREAMER, url, str(form.num_streams), str(form.num_tokens)]
    found = Streams(defaultdict(list), {})
    heard: dict[int, float] = {}
    left = form.num_streams * form.num_tokens // 3
    with hosts.start("h0", *words, log=log) as clients:
        assert clients.stdout is not None
        for line in clients.stdout:
            number, _, text = line.partition(" ")
            choice, now = json.loads(text)["choices"][0], time.monotonic()
            found.longest_gap_s = max(found.longest_gap_s, now - heard.get(int(number), now))
            heard[int(number)] = now
            tokens = choice.get("token_ids") or []
            found.tokens[int(number)] += tokens
            if choice["finish_reason"]:
                found.reasons[int(number)] = choice["finish_reason"]
            if left > 0 >= left - len(tokens):
                then()
            left -= len(tokens)
        assert clients.wait(TIMEOUT_S) == 0, log.read_text()
    assert set(found.reasons.values()) == {"length"}
    assert {len(tokens) for tokens in found.tokens.values()} == {form.num_tokens}
    return found


@pytest.mark.slow
def test_a_host_that_is_powered_off_costs_no_stream_and_is_made_good(tmp_path: Path) -> None:
    """Nobody is told of its end. When it is back, a new worker takes the empty place.

    First of all: hosts of its own, before those that the others share.
    """
    log = tmp_path / "clients.log"
    with three_hosts() as hosts, served_on(hosts, tmp_path / "serve.log") as url:

        def status() -> dict[str, Any]:
            return hosts.fetch("h0", f"{url}/cluster/v1/status")

        gone = next(w for w in status()["workers"] if w["role"] == "expert" and w["node"] != HEAD)
        host = f"h{int(gone['node'].rpartition('.')[2]) - 10}"
        calm = stream(hosts, url, log, FULL, lambda: None)
        hit = stream(hosts, url, log, FULL, lambda: hosts.power_off(host))
        assert hit.tokens == calm.tokens
        print(f"longest gap {hit.longest_gap_s:.2f} s, limit {DETECTION_LIMIT_S:g} s")
        found = status()
        assert {w["name"]: w["state"] for w in found["workers"]}[gone["name"]] == "LOST"
        assert found["state"] == "DEGRADED"
        assert found["experts_complete"]
        hosts.boot(host)
        deadline = time.monotonic() + TIMEOUT_S
        while (found := status())["state"] != "SERVING":
            assert time.monotonic() < deadline, found
            time.sleep(0.5)
        assert stream(hosts, url, log, FULL, lambda: None).tokens == calm.tokens


def test_three_hosts_answer_with_the_local_engines_tokens(hosts: Hosts, url: str) -> None:
    status = hosts.fetch("h1", f"{url}/cluster/v1/status")
    assert len({w["node"] for w in status["workers"]}) == 3
    body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
    answer = hosts.fetch("h2", f"{url}/v1/completions", body | {"return_token_ids": True})
    choice = answer["choices"][0]
    section = EngineSection(deterministic=True)
    local = LocalEngine(bundled_checkpoint(), dtype="float32", section=section)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0)
    (expected,) = local.generate([choice["prompt_token_ids"]], params)
    assert tuple(choice["token_ids"]) == expected.token_ids


@pytest.mark.parametrize("form", FORMS)
def test_a_silenced_host_with_experts_costs_no_stream(
    hosts: Hosts, url: str, tmp_path: Path, form: Form
) -> None:
    """Frames to and from it are dropped; after its healing it disturbs nobody."""
    workers = hosts.fetch("h0", f"{url}/cluster/v1/status")["workers"]
    serving = [w for w in workers if w["role"] == "expert" and w["state"] == "SERVING"]
    elsewhere = [w for w in serving if w["node"] != HEAD]
    if len(serving) < 2 or not elsewhere:
        pytest.skip("the hosts were used up by another form")
    silenced = elsewhere[0]
    host = f"h{int(silenced['node'].rpartition('.')[2]) - 10}"
    log = tmp_path / "clients.log"
    calm = stream(hosts, url, log, form, lambda: None)
    hit = stream(hosts, url, log, form, lambda: hosts.mute(host))
    assert hit.tokens == calm.tokens
    print(f"longest gap {hit.longest_gap_s:.2f} s, limit {DETECTION_LIMIT_S:g} s")
    workers = hosts.fetch("h0", f"{url}/cluster/v1/status")["workers"]
    assert {w["name"]: w["state"] for w in workers}[silenced["name"]] == "LOST"
    hosts.run("heal", host)
    assert stream(hosts, url, log, form, lambda: None).tokens == calm.tokens
