"""One attention and two expert workers on three hosts, in network namespaces of this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.config import EngineSection
from cluster.model_source import bundled_checkpoint
from workers.local_engine import LocalEngine
from workers.request import SamplingParams

pytestmark = pytest.mark.ray

SCRIPT = Path(__file__).parent / "pretend_hosts" / "cluster.sh"
HEAD = "10.77.0.10"
PROMPT = "ROMEO:\nWhat light is this"
NUM_TOKENS = 24
TIMEOUT_S = 240.0
NEEDED = ("unshare", "nsenter", "ip", "bridge")

CLIENT = """
import sys, urllib.request
body = sys.stdin.buffer.read() or None
headers = {"Content-Type": "application/json"}
request = urllib.request.Request(sys.argv[1], data=body, headers=headers)
sys.stdout.buffer.write(urllib.request.urlopen(request, timeout=240).read())
"""


def why_not() -> str:
    """Why there can be no pretend hosts here; empty if there can."""
    if os.geteuid() != 0:
        return "pretend hosts need root"
    missing = [name for name in NEEDED if shutil.which(name) is None]
    return f"pretend hosts need {', '.join(missing)}" if missing else ""


class Hosts:
    """Three hosts with a Ray cluster over them."""

    def __init__(self, state: Path) -> None:
        self._env = os.environ | {
            "NETSIM_STATE": str(state),
            "NETSIM_PYBIN": str(Path(sys.executable).parent),
            "NETSIM_CPUS": "1",
            "XDG_STATE_HOME": str(state.parent / "home"),
            "OMP_NUM_THREADS": "1",
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


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
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


def test_three_hosts_answer_with_the_local_engines_tokens(hosts: Hosts, tmp_path: Path) -> None:
    log = tmp_path / "serve.log"
    words = ["-m", "cluster.cli.main", "serve", "--address", f"{HEAD}:6379", "--host", HEAD]
    words += ["--allow-unauthenticated", "--dtype", "float32", "--deterministic"]
    server = hosts.start("h0", sys.executable, *words, log=log)
    try:
        assert server.stdout is not None
        ready = server.stdout.readline()
        assert ready.startswith("expertmesh ready http="), log.read_text()
        url = ready.split("http=")[1].split()[0]
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
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.communicate(timeout=TIMEOUT_S)
