"""Our dashboard, our alerts and vLLM's dashboards, as a real Prometheus sees a real cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from benchmarks.harness.server import WAIT_S, Served, running_server
from benchmarks.harness.stalls import wait_until
from tests.conformance.monitoring import (
    FOLDER,
    alert_rules,
    hastened,
    names_in,
    panel_queries,
    vllm_queries,
)
from tests.harness.clients import prometheus_tool
from tests.harness.prometheus import Prometheus, running_prometheus

pytestmark = [pytest.mark.ray, pytest.mark.slow]

OPTIONS = ("--num-gateway-replicas", "2", "--num-attention-workers", "2", "--vllm-metric-names")
FACTOR = 15
"""Times of the rules are divided by it: 5 minutes are 20 seconds."""
NUM_TOKENS = 24
ALERTS_OF_A_LOSS = {"ExpertmeshWorkerLost", "ExpertmeshNotServing", "ExpertmeshDegraded"}
"""What may fire for the loss of one worker; the first one must."""
ALERTS_OF_REST = {"ExpertmeshUnbalanced", "ExpertmeshExpertsAtRisk"}
"""True of this cluster, all of which is on one host and hardly busy."""


@dataclass(frozen=True, slots=True)
class Watched:
    """A cluster, and the Prometheus that watches it."""

    server: Served
    prometheus: Prometheus

    @property
    def model(self) -> str:
        return str(self.server.client.get("/v1/models").json()["data"][0]["id"])

    def load(self, num_calls: int = 4) -> int:
        """Send some calls, each on a connection of its own; returns the tokens that came."""
        body = {"prompt": "ROMEO: what light", "max_tokens": NUM_TOKENS, "ignore_eos": True}
        for _ in range(num_calls):
            answer = httpx.post(f"{self.server.http}/v1/completions", json=body, timeout=WAIT_S)
            assert answer.status_code == 200, answer.text
        return num_calls * NUM_TOKENS


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Prometheus asks twice, as it asks every gateway pod: both answers are of the whole."""
    prometheus_tool("prometheus")  # else it is skipped before the server starts
    folder = tmp_path_factory.mktemp("watched")
    rules = hastened(alert_rules(), FACTOR)
    with running_server(folder, *OPTIONS) as server:
        port = server.http_address[1]
        targets = [f"127.0.0.1:{port}", f"localhost:{port}"]
        with running_prometheus(folder, targets, rules) as prometheus:
            yield Watched(server, prometheus)


@contextlib.contextmanager
def told(missing: list[str]) -> Iterator[None]:
    """Name what is missing when a wait within gives up."""
    try:
        yield
    except AssertionError as err:
        raise AssertionError(f"no data for {missing}") from err


def test_promtool_accepts_the_rules() -> None:
    file = str(FOLDER / "alerts.yaml")
    words = [prometheus_tool("promtool"), "check", "rules", "--lint-fatal", file]
    done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_scrapes_are_of_the_whole_cluster(watched: Watched) -> None:
    """The tokens of both gateways, and no token twice."""
    total = "sum(max without (instance) (expertmesh:generation_tokens_total))"
    watched.prometheus.wait_series("count(expertmesh:generation_tokens_total)", 8)
    (before,) = watched.prometheus.query(total)
    num_tokens = watched.load(12)
    at_least = float(before["value"][1]) + num_tokens
    by_scrape = "sum by (instance) (expertmesh:generation_tokens_total)"
    watched.prometheus.wait_series(f"min({by_scrape})", at_least)
    for query in (total, by_scrape):
        values = [float(series["value"][1]) for series in watched.prometheus.query(query)]
        assert set(values) == {at_least}, query


def test_every_panel_shows_something(watched: Watched) -> None:
    queries = panel_queries()
    assert len(queries) > 20

    missing: list[str] = []

    def are_all_there() -> bool:
        watched.load()
        missing[:] = [w for w, query in queries.items() if not watched.prometheus.query(query)]
        return not missing

    with told(missing):
        wait_until(are_all_there, "data for all")


def test_every_rule_is_about_what_is_there(watched: Watched) -> None:
    def are_evaluated() -> bool:
        return all(rule["health"] != "unknown" for rule in watched.prometheus.rules())

    wait_until(are_evaluated, "the first evaluation")
    rules = watched.prometheus.rules()
    assert len(rules) == sum(len(group["rules"]) for group in alert_rules()["groups"])
    for rule in rules:
        assert rule["health"] == "ok", (rule["name"], rule.get("lastError"))
        for name in names_in(rule["query"]):
            assert watched.prometheus.query(f"count({name})"), (rule["name"], name)


def test_dashboards_of_vllm_show_something(watched: Watched) -> None:
    queries = list(vllm_queries(watched.model))

    missing: list[str] = []

    def are_all_there() -> bool:
        watched.load()
        missing[:] = [query for query in queries if not watched.prometheus.query(query)]
        return not missing

    with told(missing):
        wait_until(are_all_there, "data for all")


def test_the_loss_of_a_worker_is_reported_until_it_is_over(watched: Watched) -> None:
    prometheus = watched.prometheus
    prometheus.wait_series('max(expertmesh:cluster_state{state="SERVING"})', 1)
    allowed = ALERTS_OF_REST | ALERTS_OF_A_LOSS
    wait_until(lambda: not prometheus.firing().keys() & ALERTS_OF_A_LOSS, "calm")
    victim = next(w for w in watched.server.status()["workers"] if w["role"] == "expert")
    os.kill(int(victim["pid"]), signal.SIGKILL)
    seen: set[str] = set()

    def fires() -> bool:
        firing = prometheus.firing()
        seen.update(firing)
        causes = {labels["cause"] for labels in firing.get("ExpertmeshWorkerLost", ())}
        return causes == {"expert_worker"}

    wait_until(fires, "the alert")

    def is_over() -> bool:
        watched.load(1)
        firing = prometheus.firing().keys()
        seen.update(firing)
        return not firing & ALERTS_OF_A_LOSS

    wait_until(is_over, "the end of the alert")
    assert seen <= allowed
    assert watched.server.status()["state"] == "SERVING"


def test_a_cluster_that_is_gone_is_reported(tmp_path: Path) -> None:
    """Nobody answers where Prometheus asks."""
    rules = hastened(alert_rules(), FACTOR)
    with running_prometheus(tmp_path, ["127.0.0.1:9"], rules) as prometheus:
        wait_until(prometheus.firing, "an alert")
        assert prometheus.firing().keys() == {"ExpertmeshGone"}


ANSWERS = {'expertmesh:cluster_state{state="SERVING"}': "1x150"}
FIRING: Mapping[str, dict[str, str]] = {
    "ExpertmeshNotServing": {
        'expertmesh:cluster_state{state="RECOVERING"}': "1x60",
        'expertmesh:cluster_state{state="SERVING"}': "0x60",
    },
    "ExpertmeshGone": {},
    "ExpertmeshDegraded": {'expertmesh:cluster_state{state="DEGRADED"}': "1x60"},
    "ExpertmeshWorkerLost": {'expertmesh:recoveries_total{cause="expert_worker"}': "0x55 1 1x5"},
    "ExpertmeshExpertsAtRisk": {'expertmesh:experts_at_risk{layer="0"}': "2x150"},
    "ExpertmeshUnbalanced": {
        'expertmesh:expert_load_balancedness_achieved{layer="all",phase="decode"}': "0.5x100"
    },
    "ExpertmeshRefusing": {
        'expertmesh:admission_rejections_total{reason="queue_full"}': "0+10x60",
        'expertmesh:http_requests_total{method="POST"}': "0+100x60",
    },
    "ExpertmeshSlowFirstToken": {
        'expertmesh:time_to_first_token_seconds_bucket{le="5"}': "0+1x60",
        'expertmesh:time_to_first_token_seconds_bucket{le="10"}': "0+100x60",
        'expertmesh:time_to_first_token_seconds_bucket{le="+Inf"}': "0+100x60",
    },
    "ExpertmeshShortOfKV": {'expertmesh:num_preemptions_total{worker="a"}': "0+30x60"},
    "ExpertmeshOldPlacement": {'expertmesh:placement_epoch_lag{worker="a"}': "2x60"},
}
"""By alert, series with a value a minute for which it fires, from two scrapes alike."""
HEALTHY = {
    **ANSWERS,
    'expertmesh:cluster_state{state="RECOVERING"}': "0x150",
    'expertmesh:cluster_state{state="DEGRADED"}': "0x150",
    'expertmesh:recoveries_total{cause="expert_worker"}': "3x150",
    'expertmesh:experts_at_risk{layer="0"}': "0x150",
    'expertmesh:expert_load_balancedness_achieved{layer="all",phase="decode"}': "0.9x150",
    'expertmesh:admission_rejections_total{reason="queue_full"}': "0+1x150",
    'expertmesh:http_requests_total{method="POST"}': "0+100x150",
    'expertmesh:time_to_first_token_seconds_bucket{le="5"}': "0+100x150",
    'expertmesh:time_to_first_token_seconds_bucket{le="+Inf"}': "0+100x150",
    'expertmesh:num_preemptions_total{worker="a"}': "0+1x150",
    'expertmesh:placement_epoch_lag{worker="a"}': "0x150",
}


def test_each_alert_fires_for_its_reason_alone(tmp_path: Path) -> None:
    """By promtool, which moves the clock; two gateways report the same."""
    rules = alert_rules()["groups"][0]["rules"]
    assert FIRING.keys() == {rule["alert"] for rule in rules}
    tests = []
    for name, series in FIRING.items():
        reported = series if name == "ExpertmeshGone" else {**ANSWERS, **series}
        wanted = {alert: alert == name for alert in FIRING}
        minute = 140 if name == "ExpertmeshExpertsAtRisk" else 58
        tests.append(_promtool_test(name, reported, minute, wanted))
    tests.append(_promtool_test("healthy", HEALTHY, 140, dict.fromkeys(FIRING, False)))
    document = {"rule_files": [str(FOLDER / "alerts.yaml")], "tests": tests}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(document))
    words = [prometheus_tool("promtool"), "test", "rules", str(tmp_path / "tests.yaml")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stdout + done.stderr


def _promtool_test(
    name: str, series: dict[str, str], minute: int, wanted: dict[str, bool]
) -> dict[str, object]:
    """Whether each alert fires, by the number of ``ALERTS`` series."""
    scraped = [
        {"series": f'{key[:-1]},instance="{instance}"}}', "values": values}
        for key, values in series.items()
        for instance in ("a", "b")
    ]
    queries = [
        {
            "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) > 0 or vector(0)',
            "eval_time": f"{minute}m",
            "exp_samples": [{"labels": "{}", "value": int(fires)}],
        }
        for alert, fires in wanted.items()
    ]
    return {
        "name": name,
        "interval": "1m",
        "input_series": scraped,
        "promql_expr_test": queries,
    }
