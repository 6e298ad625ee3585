"""Alert rules and the Grafana dashboard ask for metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from gateway.observability.cluster_metrics import WORKER_TEXTS
from tests.gateway.stack import complete, running_stack
from tests.k8s import checks_wiring, validator
from tests.k8s.kuberay import K8S, OVERLAYS, Manifests, NoKubectl

pytestmark = pytest.mark.heavy

FOLDER = K8S / "monitoring"
_NAME = re.compile(r"\bexpertmesh:([a-z_]+)")
_OF_HISTOGRAMS = ("_bucket", "_count", "_sum")


def exported() -> set[str]:
    """Names of all samples, without the prefix."""
    with running_stack() as stack:
        complete(stack, prompt="hello", max_tokens=3)
        text = stack.http.get("/metrics").text
    families = {
        family.name.removeprefix("expertmesh:"): family.type
        for family in text_string_to_metric_families(text)
    }
    suffixes = {"counter": ("_total",), "histogram": _OF_HISTOGRAMS}
    found = {
        f"{name}{suffix}" for name, kind in families.items() for suffix in suffixes.get(kind, ("",))
    }
    return found | {f"{name}{suffix}" for name in WORKER_TEXTS for suffix in ("", *_OF_HISTOGRAMS)}


def expressions() -> list[str]:
    rules = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
    dashboard = json.loads((FOLDER / "dashboard.json").read_text())
    return [
        *(rule["expr"] for group in rules["groups"] for rule in group["rules"]),
        *(target["expr"] for panel in dashboard["panels"] for target in panel["targets"]),
    ]


def test_every_query_asks_for_metrics_that_exist() -> None:
    known = exported()
    for expression in expressions():
        names = _NAME.findall(expression)
        assert names, expression
        assert set(names) <= known, expression


def test_rules_have_what_an_operator_reads() -> None:
    rules = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"]["summary"]


def test_scrapes_of_several_gateways_are_never_added_up() -> None:
    for expression in expressions():
        if "sum" in expression:
            assert "max without" in expression, expression


def test_the_operator_s_rules_are_those_of_prometheus() -> None:
    rules = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
    resource = yaml.safe_load((FOLDER / "prometheusrule.alerts.yaml").read_text())
    assert resource["spec"] == rules


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_with_monitoring(overlay: str, tmp_path: Path) -> None:
    """What it adds is valid, and is found by Prometheus' operator and Grafana's sidecar."""
    root = tmp_path / "k8s"
    shutil.copytree(K8S, root)
    file = root / "overlays" / overlay / "kustomization.yaml"
    whole = yaml.safe_load(file.read_text())
    whole["components"].insert(0, "../../monitoring")
    file.write_text(yaml.safe_dump(whole))
    try:
        before, after = Manifests.of(overlay), Manifests.of(overlay, root)
    except NoKubectl as err:
        pytest.skip(str(err))
    assert list(validator.problems(after.objects)) == []
    assert list(checks_wiring.labels(after)) == []
    known = {(o["kind"], o["metadata"]["name"]) for o in before.objects}
    new = [o for o in after.objects if (o["kind"], o["metadata"]["name"]) not in known]
    assert sorted(o["kind"] for o in new) == ["ConfigMap", "PrometheusRule"]
    dashboard = after.named("ConfigMap", "expertmesh-dashboard")
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(dashboard["data"]["expertmesh.json"]) == json.loads(
        (FOLDER / "dashboard.json").read_text()
    )


def test_a_rule_that_the_operator_refuses_is_seen() -> None:
    resource = yaml.safe_load((FOLDER / "prometheusrule.alerts.yaml").read_text())
    assert validator.problems([resource]) == []
    rule = resource["spec"]["groups"][0]["rules"][0]
    for wrong in ({"for": "soon"}, {"severity": "critical"}, {"expr": None}):
        changed = {**resource, "spec": {"groups": [{"name": "x", "rules": [{**rule, **wrong}]}]}}
        assert validator.problems([changed]) != [], wrong
