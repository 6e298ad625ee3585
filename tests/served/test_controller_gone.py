"""The controller of a served cluster is killed: clients, probes, commands, the cluster's end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from benchmarks.harness.server import GOOD, WAIT_S, command, environment, running_server
from benchmarks.harness.stalls import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_server_outlasts_its_controller_and_still_ends_cleanly(tmp_path: Path) -> None:
    with running_server(tmp_path, "--deterministic") as server:
        before = server.status()
        expected = server.complete(**GOOD)["choices"]
        os.kill(before["controller_pid"], signal.SIGKILL)
        assert server.complete(**GOOD)["choices"] == expected
        wait_until(lambda: server.status()["term"] > before["term"], "the next controller")
        after = server.status()
        assert after["generation"] == before["generation"]
        assert [(w["pid"], w["state"]) for w in after["workers"]] == [
            (w["pid"], "SERVING") for w in before["workers"]
        ]
        assert server.client.get("/ready").status_code == 200
        assert server.complete(**GOOD)["choices"] == expected
        asked = subprocess.run(
            command("status", "--json", "--url", server.http),
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )
        assert asked.returncode == 0, asked.stderr
        assert json.loads(asked.stdout)["term"] == after["term"]
        server.wait_idle()
