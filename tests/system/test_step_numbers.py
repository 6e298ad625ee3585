"""Timings of the parts of steps, from real workers to the exposition."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from cluster.launch.model_source import bundled_checkpoint
from gateway.observability.metrics import GatewayMetrics
from workers.requests.request import Request, SamplingParams

OF_ATTENTION = {"attention_compute_seconds", "dispatch_seconds", "combine_seconds"}
OF_EXPERTS = {"expert_compute_seconds", "dispatch_bytes", "dispatch_padding_ratio"}
BUBBLE = {"bubble_seconds"}
TYPES = {"dispatch_bytes": "counter", "dispatch_padding_ratio": "gauge"}


def families(snapshot: dict[str, Any]) -> list[Metric]:
    text = GatewayMetrics("model", lambda: snapshot).render().decode()
    return list(text_string_to_metric_families(text))


def reported(snapshot: dict[str, Any]) -> dict[str, set[str]]:
    """Names of the parts' families that a worker has, by worker."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for family in families(snapshot):
        name = family.name.removeprefix("expertmesh:")
        if name in OF_ATTENTION | OF_EXPERTS | BUBBLE:
            for sample in family.samples:
                found[sample.labels["worker"]].add(name)
    return found


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (
            "disaggregated",
            {"attention-0": OF_ATTENTION | BUBBLE, "expert-0": OF_EXPERTS | BUBBLE},
        ),
        ("colocated", {"colocated-0": OF_ATTENTION | OF_EXPERTS | BUBBLE}),
        ("local", {"attention-0": OF_ATTENTION}),
    ],
)
def test_every_worker_reports_its_parts_by_phase(mode: str, expected: dict[str, set[str]]) -> None:
    pools = {"num_expert_workers": 0} if mode == "local" else {}
    config = make_config(bundled_checkpoint(), 1, 1, workers={"mode": mode, **pools})
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    request = Request(request_id="r", prompt=tuple(range(10, 40)), params=params)
    with serving(ThreadCluster(config)) as cluster:
        cluster.answers([request])
        snapshot = cluster.wait(lambda snapshot: reported(snapshot) == expected, fresh=True)
        assert len(snapshot["history"]) == 1, "a worker was lost"
    for family in families(snapshot):
        name = family.name.removeprefix("expertmesh:")
        assert len(family.documentation.split()) > 1, f"{name} has no help text"
        if name not in OF_ATTENTION | OF_EXPERTS | BUBBLE:
            continue
        assert family.type == TYPES.get(name, "histogram")
        for sample in family.samples:
            if sample.name.endswith("_sum"):
                assert sample.labels["phase"] in ("prefill", "decode")
            if name in TYPES:
                assert sample.labels["direction"] in ("dispatch", "combine")
            if name == "dispatch_bytes":
                assert sample.value > 0
            if name == "dispatch_padding_ratio":
                assert sample.value == 0  # the only expert worker has all experts of a row
