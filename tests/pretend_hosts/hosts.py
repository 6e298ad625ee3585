"""Pretend hosts: each has an address, a process table and a Ray node of its own.

hosts = NodeHosts(folder)
hosts.run("up", "3")
hosts.begin("h0", "ray", "start", "--head", "--block")
hosts.fetch("h1", "http://10.77.0.10:8000/ready")
hosts.close()

``cluster.sh`` beside this file makes the namespaces and lists all its commands.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.harness.stalls import Limit
from tests.harness.fault_rows import Form

SCRIPT = Path(__file__).parent / "cluster.sh"
TIMEOUT_S = 240.0
NEEDED = ("unshare", "nsenter", "ip", "bridge")
_POLL_S = 0.5
_STARTS_RAY = re.compile(r"python\S* (-m ray\.scripts\.scripts|\S+/ray) start ")
"""The command line of ``ray start --block``, under ``expertmesh node`` and in a container."""

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
    if missing:
        return f"pretend hosts need {', '.join(missing)}"
    command = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "true"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    return f"pretend hosts need namespaces: {made.stderr.strip()}" if made.returncode else ""


def address_of(host: str) -> str:
    """``h2`` is 10.77.0.12."""
    return f"10.77.0.{10 + int(host[1:])}"


def host_of(address: str) -> str:
    """10.77.0.12 is ``h2``."""
    return f"h{int(address.rpartition('.')[2]) - 10}"


def wait_until(is_true: Callable[[], object], what: str) -> None:
    """Ask until it is so; ``what`` is for the failure."""
    limit = Limit(TIMEOUT_S)
    while not is_true():
        assert not limit.is_over(), f"gave up waiting: {what}"
        time.sleep(_POLL_S)


def wait_serving(status: Callable[[], dict[str, Any]]) -> None:
    """Ask for the cluster's status until the cluster is whole."""
    limit = Limit(TIMEOUT_S)
    while (found := status())["state"] != "SERVING":
        assert not limit.is_over(), f"{found['state']}: {found['problems']}, {found['workers']}"
        time.sleep(_POLL_S)


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
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"
        return done.stdout

    def boots(self, host: str) -> bool:
        """Boot a host that was killed; False while some of its processes still exist."""
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

    def silence_for(self, host: str, seconds: float) -> None:
        """Drop its frames from now on, and no longer after that time."""
        self.mute(host)
        threading.Timer(seconds, self.run, ("heal", host)).start()

    def power_off(self, host: str) -> None:
        """All its processes end, and no frame announces it."""
        self.run("poweroff", host)

    def kill(self, host: str) -> None:
        """All its processes are gone, and its sockets are closed."""
        self.run("kill", host)

    def start(
        self, host: str, *words: str, log: Path, output: IO[str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a program on a host, in a process group of its own; stdout is a pipe by default."""
        with log.open("w") as errors:
            return subprocess.Popen(
                ["bash", str(SCRIPT), "exec", host, *words],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=output or subprocess.PIPE,
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


class NodeHosts(Hosts):
    """Hosts that each run a program in the foreground: a node of Ray."""

    def __init__(self, folder: Path, **more: str) -> None:
        """The programs' output goes to ``hN.log`` in ``folder``."""
        super().__init__(folder / "n", **more)
        self.folder = folder
        self._programs: dict[str, subprocess.Popen[str]] = {}

    def begin(self, host: str, *words: str) -> None:
        """Start the program of a host, whose earlier one has died with it."""
        if host in self._programs:
            self._programs.pop(host).communicate(timeout=TIMEOUT_S)
        with (self.folder / f"{host}.out").open("w") as output:
            log = self.folder / f"{host}.log"
            self._programs[host] = self.start(host, *words, log=log, output=output)

    def check_running(self, host: str) -> None:
        """Fail with the last output of a host's program if it has ended by itself."""
        status = self._programs[host].poll()
        if status is not None:
            files = (self.folder / f"{host}.{end}" for end in ("out", "log"))
            text = "".join(path.read_text(errors="replace")[-3000:] for path in files)
            raise AssertionError(f"the program of {host} ended with {status}: {text}")

    def has_ended(self, host: str) -> bool:
        """Whether the program of a host has ended by itself."""
        return self._programs[host].poll() is not None

    def stop(self, host: str) -> None:
        """SIGTERM to the Ray of a host, as to a container; wait until its program has ended."""
        lines = [line.split(maxsplit=1) for line in self.run("pids", host).splitlines()]
        (pid,) = (int(pid) for pid, words in lines if _STARTS_RAY.search(words))
        os.kill(pid, signal.SIGTERM)
        self._programs[host].wait(TIMEOUT_S)

    def close(self) -> None:
        """End all that was started here."""
        with suppress(AssertionError):
            self.run("down")
        for program in self._programs.values():
            with suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.communicate(timeout=TIMEOUT_S)


@dataclass(slots=True)
class Streams:
    """What the clients of a run got, by stream."""

    tokens: dict[int, list[int]]
    reasons: dict[int, str]
    longest_gap_s: float = 0.0
    """Longest time in which one stream had no event."""


def stream(
    hosts: Hosts,
    url: str,
    log: Path,
    form: Form,
    then: Callable[[], object],
    clients_on: str = "h0",
) -> Streams:
    """Serve streams to clients on a host; ``then`` is called under way."""
    words = [sys.executable, "-c", STREAMER, url, str(form.num_streams), str(form.num_tokens)]
    found = Streams(defaultdict(list), {})
    heard: dict[int, float] = {}
    left = form.num_streams * form.num_tokens // 3
    with hosts.start(clients_on, *words, log=log) as clients:
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
