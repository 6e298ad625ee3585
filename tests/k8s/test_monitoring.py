"""Alert rules and the Grafana dashboard ask for metrics that exist."""

from __future__ import annotations

import json
import re

import yaml
from prometheus_client.parser import text_string_to_metric_families

from gateway.observability.cluster_metrics import WORKER_TEXTS
from tests.gateway.stack import complete, running_stack
from tests.paths import ROOT

FOLDER = ROOT / "k8s" / "monitoring"
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
