"""A real Prometheus that scrapes a server, with rules, and answers queries."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.harness.distributed import free_ports
from benchmarks.harness.stalls import wait_until
from tests.harness.clients import prometheus_tool

LIMIT_S = 60.0
STOP_LIMIT_S = 20.0
INTERVAL_S = 1
"""Between two scrapes, and two evaluations of the rules."""


@dataclass(frozen=True, slots=True)
class Prometheus:
    """One that runs."""

    client: httpx.Client

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression has now. Raises ``AssertionError`` for a wrong one."""
        answer = self.client.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", (expression, answer)
        assert not answer.get("warnings"), (expression, answer)
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def rules(self) -> list[dict[str, Any]]:
        """The rules, with their health and their active alerts."""
        groups = self.client.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def firing(self) -> dict[str, list[Mapping[str, str]]]:
        """Labels of the alerts that fire, by name."""
        found: dict[str, list[Mapping[str, str]]] = {}
        for alert in self.client.get("/api/v1/alerts").json()["data"]["alerts"]:
            if alert["state"] == "firing":
                found.setdefault(alert["labels"]["alertname"], []).append(alert["labels"])
        return found

    def wait_series(self, expression: str, at_least: float = 0.0) -> None:
        """Until an expression has a value that large."""

        def is_there() -> bool:
            return any(float(s["value"][1]) >= at_least for s in self.query(expression))

        wait_until(is_there, f"{expression} of at least {at_least:g}", LIMIT_S)


@contextlib.contextmanager
def running_prometheus(
    folder: Path, targets: Sequence[str], rules: Mapping[str, Any]
) -> Iterator[Prometheus]:
    """Scrape ``targets`` (``host:port``) for the length of a ``with`` block.

    ``rules`` is a document as in a file of ``rule_files``. Skips where there is no Prometheus.
    """
    program = prometheus_tool("prometheus")
    (folder / "rules.yaml").write_text(yaml.safe_dump(dict(rules)))
    interval = f"{INTERVAL_S}s"
    config = {
        "global": {"scrape_interval": interval, "evaluation_interval": interval},
        "rule_files": [str(folder / "rules.yaml")],
        "scrape_configs": [{"job_name": "em", "static_configs": [{"targets": list(targets)}]}],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    words = [program, f"--config.file={folder}/prometheus.yaml"]
    words += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "prometheus.log").open("wb") as log:
        child = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT_S) as client:
            wait_until(lambda: _is_ready(client), "a Prometheus that is ready", LIMIT_S)
            yield Prometheus(client)
    finally:
        child.terminate()
        child.wait(STOP_LIMIT_S)


def _is_ready(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return client.get("/-/ready").status_code == 200
    return False
