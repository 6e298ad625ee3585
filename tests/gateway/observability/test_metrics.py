"""``/metrics``: names, labels, and what it counts."""

from __future__ import annotations

import asyncio
import time

import httpx
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.harness.large_snapshot import load_of_banks, snapshot_of
from cluster.config.gateway import GatewaySection
from cluster.controller.metrics import ControllerMetrics
from gateway.observability.metrics import GatewayMetrics
from gateway.observability.vllm_names import OLDER_VLLM_NAMES, VLLM_NAMES
from tests.gateway.fakes import FakeController
from tests.gateway.sse_client import read_events
from tests.gateway.stack import MODEL, WAIT_S, Stack, complete, post, running_stack

MOST_SERIES = 1500
COMPLETIONS = "/v1/completions"
COUNTERS = [
    "prompt_tokens",
    "generation_tokens",
    "request_success",
    "admission_rejections",
    "http_requests",
    "grpc_requests",
    "client_disconnects",
    "sse_events",
    "requests_replayed",
    "tokens_recomputed",
    "num_preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prompt_tokens_cached",
    "expert_worker_tokens",
    "expert_tokens",
    "rebalance",
    "migration_bytes",
    "migration_slots_moved",
    "recoveries",
]
GAUGES = [
    "num_requests_running",
    "num_requests_waiting_by_reason",
    "kv_cache_usage_perc",
    "cache_config_info",
    "placement_epoch",
    "placement_epoch_lag",
    "cluster_state",
    "expert_worker_up",
    "expert_worker_slots",
    "expert_replicas",
    "experts_at_risk",
    "expert_load_balancedness_achieved",
    "expert_load_balancedness_predicted",
]
OF_CALLS = [
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
]
OF_ENGINES = ["prompt_tokens", "generation_tokens", "request_success", *OF_CALLS]
"""What vLLM labels with the engine."""
HISTOGRAMS = [
    "recovery_stall_seconds",
    "rebalance_stall_seconds",
    "gateway_stream_lag_seconds",
    "migration_seconds",
    "iteration_tokens_total",
    *OF_CALLS,
]


def _scrape(stack: Stack) -> dict[str, Metric]:
    response = stack.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = list(text_string_to_metric_families(response.text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    assert all(name.startswith("expertmesh:") for name in names)
    return {family.name.removeprefix("expertmesh:"): family for family in families}


def _value(families: dict[str, Metric], name: str, suffix: str = "", **labels: str) -> float:
    return sum(
        sample.value
        for sample in families[name].samples
        if sample.name == f"expertmesh:{name}{suffix}"
        and all(sample.labels[key] == value for key, value in labels.items())
    )


def test_names_types_and_labels(stack: Stack) -> None:
    complete(stack, prompt="x", max_tokens=2)
    families = _scrape(stack)
    for names, kind in ((COUNTERS, "counter"), (GAUGES, "gauge"), (HISTOGRAMS, "histogram")):
        for name in names:
            assert families[name].type == kind, name
    samples = [sample for family in families.values() for sample in family.samples]
    assert len(samples) < MOST_SERIES
    assert all(sample.labels["model_name"] == "tiny" for sample in samples)
    assert not any(sample.name.endswith("_created") for sample in samples)
    assert "bad name" not in families


def test_calls_are_counted_by_engine() -> None:
    """At 0 from the start; afterwards nowhere else.

    On a gateway of its own: a call whose time is over before it is sent is no engine's.
    """
    metrics = GatewayMetrics("tiny", lambda: None)
    metrics.engine("7")
    families = {f.name: f for f in text_string_to_metric_families(metrics.render().decode())}
    for name in ("prompt_tokens", "generation_tokens"):
        (sample,) = families[f"expertmesh:{name}"].samples
        assert (sample.labels["engine"], sample.value) == ("7", 0.0)
    with running_stack() as stack:
        complete(stack, prompt=["x", "y"], max_tokens=2)
        scraped = _scrape(stack)
    for name in OF_ENGINES:
        assert {sample.labels["engine"] for sample in scraped[name].samples} == {"0"}, name


def test_rebalancing_is_counted_by_outcome(stack: Stack) -> None:
    families = _scrape(stack)
    assert _value(families, "rebalance", "_total", outcome="applied") == 2
    assert _value(families, "rebalance", "_total", outcome="skipped_gain") == 7
    assert _value(families, "migration_bytes", "_total", reason="rebalance") == 4096
    assert _value(families, "migration_slots_moved", "_total", reason="rebalance") == 3
    assert _value(families, "migration_slots_moved", "_total", reason="recovery") == 1
    assert _value(families, "migration_seconds", "_count", reason="rebalance") == 2
    assert _value(families, "migration_seconds", "_bucket", reason="rebalance", le="0.3") == 1
    assert _value(families, "rebalance_stall_seconds", "_bucket", le="0.01") == 1
    assert _value(families, "rebalance_stall_seconds", "_sum") == 0.05


def test_every_metric_says_what_it_is(stack: Stack) -> None:
    complete(stack, prompt="x", max_tokens=2)
    families = _scrape(stack)
    helps = {name: family.documentation for name, family in families.items()}
    assert [name for name, text in helps.items() if name in text or len(text.split()) < 2] == []


def test_a_number_of_blocks_is_no_counter() -> None:
    worker = {"name": "w", "role": "attention", "rank": 0, "state": "SERVING", "node": "here"}
    worker["stats"] = {"kv_blocks_total": 64.0, "steps_total": 3.0}
    snapshot = {"state": "SERVING", "workers": [worker]}
    text = GatewayMetrics("tiny", lambda: snapshot).render().decode()
    kinds = {f.name: f.type for f in text_string_to_metric_families(text)}
    assert kinds["expertmesh:kv_blocks_total"] == "gauge"
    assert kinds["expertmesh:steps"] == "counter"


def test_a_worker_that_is_gone_has_no_numbers_any_more() -> None:
    """Else its requests would run for ever, at a placement that falls behind."""
    stats = {"num_requests_running": 3.0, "placement_epoch": 1.0, "expert_worker_tokens_total": 9.0}
    workers = [
        {"name": f"{role}-{state}", "role": role, "rank": 0, "state": state, "stats": stats}
        for role in ("attention", "expert", "colocated")
        for state in ("SERVING", "LOST", "DRAINED")
    ]
    snapshot = {"state": "SERVING", "workers": workers, "placement_epoch": 4}
    text = GatewayMetrics("tiny", lambda: snapshot, {"a": "b"}).render().decode()
    families = text_string_to_metric_families(text)
    found = {
        (s.labels["worker"], s.name, s.value)
        for f in families
        for s in f.samples
        if "worker" in s.labels
    }
    gone = {one for one in found if not one[0].endswith("SERVING")}
    assert gone == {
        (f"{role}-LOST", "expertmesh:expert_worker_up", 0.0) for role in ("expert", "colocated")
    }
    assert ("attention-SERVING", "expertmesh:placement_epoch_lag", 3.0) in found


def test_losses_are_counted_from_0_on() -> None:
    workers = [
        {"name": role, "role": role, "rank": 0, "state": "SERVING"}
        for role in ("attention", "expert")
    ]
    counted = ControllerMetrics(["attention", "expert"]).to_plain()
    snapshot = {"state": "SERVING", "workers": workers, "metrics": counted}
    text = GatewayMetrics("tiny", lambda: snapshot).render().decode()
    for cause in ("attention_worker", "expert_worker"):
        for name in ("recoveries_total", "recovery_stall_seconds_count"):
            assert f'expertmesh:{name}{{cause="{cause}",model_name="tiny"}} 0.0' in text
    for reason in ("rebalance", "recovery", "drain", "scale"):
        for name in ("migration_bytes_total", "migration_seconds_count"):
            assert f'expertmesh:{name}{{model_name="tiny",reason="{reason}"}} 0.0' in text
    for name in ("requests_replayed", "tokens_recomputed"):
        for cause in ("attention_worker", "handed_back"):
            assert f'{name}_total{{cause="{cause}",model_name="tiny"}} 0.0' in text


def test_the_state_and_what_losses_cost(stack: Stack) -> None:
    families = _scrape(stack)
    states = {s.labels["state"]: s.value for s in families["cluster_state"].samples}
    assert states.pop("SERVING") == 1.0
    assert set(states.values()) == {0.0}
    assert "DEGRADED" in states
    assert _value(families, "recoveries", "_total", cause="expert_worker") == 3
    assert _value(families, "recovery_stall_seconds", "_bucket", le="0.1") == 1
    assert _value(families, "recovery_stall_seconds", "_bucket", le="+Inf") == 3
    assert _value(families, "recovery_stall_seconds", "_sum") == 0.75


def test_workers_have_their_labels(stack: Stack) -> None:
    families = _scrape(stack)
    up = {s.labels["worker"]: s.value for s in families["expert_worker_up"].samples}
    assert up == {"expert-0": 1.0, "expert-1": 1.0}
    (running,) = families["num_requests_running"].samples
    assert (running.labels["engine"], running.labels["worker"]) == ("0", "attention-0")
    waiting = families["num_requests_waiting_by_reason"].samples
    assert {s.labels["reason"]: s.value for s in waiting} == {"capacity": 3, "deferred": 1}
    assert {s.labels["engine"] for s in waiting} == {"0"}


def test_a_workers_histogram_keeps_its_buckets(stack: Stack) -> None:
    families = _scrape(stack)
    name = "iteration_tokens_total"
    assert _value(families, name, "_bucket", le="8", worker="attention-0") == 4
    assert _value(families, name, "_bucket", le="+Inf") == _value(families, name, "_count") == 5
    assert _value(families, name, "_sum") == 77


def test_a_workers_numbers_by_placement(stack: Stack) -> None:
    families = _scrape(stack)
    assert _value(families, "placement_epoch", worker="expert-0") == 3
    (cache,) = families["cache_config_info"].samples
    assert cache.labels["enable_prefix_caching"] == "True"
    assert cache.labels["cache_dtype"] == "auto"
    assert _value(families, "prefix_cache_hits", "_total", engine="0") == 20


def test_experts_have_their_load(stack: Stack) -> None:
    families = _scrape(stack)
    tokens = {s.labels["expert"]: s.value for s in families["expert_tokens"].samples}
    assert tokens == {"2": 3, "3": 4, "rest": 3}
    assert {s.labels["layer"] for s in families["expert_tokens"].samples} == {"0"}
    copies = {s.labels["copies"]: s.value for s in families["expert_replicas"].samples}
    assert copies == {"1": 3, "2": 1}
    achieved = families["expert_load_balancedness_achieved"].samples
    assert {(s.labels["layer"], s.labels["phase"]): s.value for s in achieved} == {
        ("all", "prefill"): 0.5,
        ("0", "prefill"): 0.5,
    }
    predicted = families["expert_load_balancedness_predicted"].samples
    assert {(s.labels["layer"], s.labels["phase"]): s.value for s in predicted} == {
        ("all", "prefill"): 1.0,
        ("0", "prefill"): 1.0,
        ("all", "decode"): 0.75,
        ("0", "decode"): 0.75,
    }


def test_every_expert_has_a_series_where_asked_for() -> None:
    load = asyncio.run(FakeController().load())
    metrics = GatewayMetrics("tiny", lambda: None, None, lambda: load, all_experts=True)
    families = {f.name: f for f in text_string_to_metric_families(metrics.render().decode())}
    samples = families["expertmesh:expert_tokens"].samples
    assert {s.labels["expert"]: s.value for s in samples} == {"0": 1, "1": 2, "2": 3, "3": 4}


def test_names_have_the_prefix_that_is_wanted() -> None:
    controller = FakeController()
    load = asyncio.run(controller.load())
    metrics = GatewayMetrics("tiny", lambda: controller.state, None, lambda: load, prefix="mesh_")
    families = list(text_string_to_metric_families(metrics.render().decode()))
    assert len(families) > 30
    assert all(family.name.startswith("mesh_") for family in families)


def test_a_large_model_has_few_series_unless_asked() -> None:
    load = asyncio.run(FakeController().load())
    bank = load["banks"][0] | {"counts": [1] * 128, "copies": [2] * 128}
    bank |= {"watched": list(range(8)), "watched_tokens": [1] * 8, "rest_tokens": 120}
    load["banks"] = [bank | {"layer": layer} for layer in range(62)]
    metrics = GatewayMetrics("dots", lambda: None, None, lambda: load)
    families = text_string_to_metric_families(metrics.render().decode())
    assert sum(len(family.samples) for family in families) < MOST_SERIES


def test_a_scrape_of_a_large_cluster_is_small() -> None:
    snapshot, load = snapshot_of(64, 64), load_of_banks(61, 384)
    metrics = GatewayMetrics("model", lambda: snapshot, load=lambda: load)
    for rank in range(64):
        metrics.engine(str(rank)).observe("time_to_first_token_seconds", 0.5)
        metrics.engine(str(rank)).count("prompt_tokens", 5)
    text = metrics.render().decode()
    assert len(text) < 2_000_000
    families = {
        family.name.removeprefix("expertmesh:"): family
        for family in text_string_to_metric_families(text)
    }
    shown = families["time_to_first_token_seconds"].samples
    counts = {s.labels["engine"]: s.value for s in shown if s.name.endswith("_count")}
    assert counts == {**{str(rank): 1 for rank in range(16)}, "rest": 48}
    assert {s.labels["engine"] for s in families["prompt_tokens"].samples} == set(
        map(str, range(64))
    )
    timed = {s.labels["worker"] for s in families["attention_compute_seconds"].samples}
    assert timed == {f"attention-{rank}" for rank in range(16)}
    assert len(families["num_requests_running"].samples) == 64


def test_requests_are_counted(stack: Stack) -> None:
    before = _scrape(stack)
    complete(stack, prompt="hello", max_tokens=5, n=2)
    events = read_events(stack, "/v1/completions", prompt="hello", max_tokens=3)
    post(stack, "/v1/completions", prompt="")
    after = _scrape(stack)

    def grown(name: str, suffix: str, **labels: str) -> float:
        return _value(after, name, suffix, **labels) - _value(before, name, suffix, **labels)

    assert grown("prompt_tokens", "_total") == 2
    assert grown("generation_tokens", "_total") == 13
    assert grown("request_success", "_total", finished_reason="length") == 3
    assert grown("http_requests", "_total", route="/v1/completions", status="200") == 2
    assert grown("http_requests", "_total", route="/v1/completions", status="400") == 1
    assert grown("sse_events", "_total") == len(events)
    assert grown("time_to_first_token_seconds", "_count") == 2
    assert grown("inter_token_latency_seconds", "_count") == 10
    assert grown("request_queue_time_seconds", "_count") == 3


def test_paths_of_clients_make_no_series(stack: Stack) -> None:
    for number in range(5):
        stack.http.get(f"/unknown/{number}")
    routes = {s.labels["route"] for s in _scrape(stack)["http_requests"].samples}
    assert "other" in routes
    assert not any("unknown" in route for route in routes)


def test_routes_are_counted_by_their_pattern(stack: Stack) -> None:
    model = "/v1/models/{model}"
    before = _scrape(stack)
    stack.http.get(f"/v1/models/{MODEL}")
    stack.http.get("/v1/models/unknown")
    with httpx.Client(base_url=f"http://{stack.admin.http}", timeout=WAIT_S) as admin:
        admin.get("/admin/v1/operations/unknown")
    after = _scrape(stack)
    for route, status in (
        (model, "200"),
        (model, "404"),
        ("/admin/v1/operations/{id}", "404"),
    ):
        of = {"route": route, "method": "GET", "status": status}
        num_before = _value(before, "http_requests", "_total", **of)
        assert _value(after, "http_requests", "_total", **of) == num_before + 1
    assert "unknown" not in {s.labels["route"] for s in after["http_requests"].samples}


def test_what_vllm_has_too_comes_under_its_names_on_request() -> None:
    section = GatewaySection(vllm_metric_names=True, request_timeout_s=WAIT_S)
    with running_stack(section) as stack:
        complete(stack, prompt="hello", max_tokens=3)
        stack.wait_no_requests()
        stack.http.get("/health")
        text = stack.http.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    known = {name for name in VLLM_NAMES if f"expertmesh:{name}" in families}
    assert known >= {*OF_CALLS, *OLDER_VLLM_NAMES.keys()} - {"prefix_cache_queries"}
    for name in known:
        theirs, ours = families[f"vllm:{name}"], families[f"expertmesh:{name}"]
        assert theirs.type == ours.type
        is_config = name == "cache_config_info"
        assert [(s.labels, s.value) for s in theirs.samples] == [
            (
                {**s.labels, "num_gpu_blocks": s.labels["num_blocks"]} if is_config else s.labels,
                s.value,
            )
            for s in ours.samples
        ]
    for name, older in ((n, o) for n, o in OLDER_VLLM_NAMES.items() if n in known):
        counts = [sum(s.value for s in families[f"vllm:{n}"].samples) for n in (name, older)]
        assert counts[0] == counts[1], older
    assert "vllm:expert_tokens" not in families
    assert families["vllm:generation_tokens"].samples[0].value == 3.0
    (good,) = (s for s in families["http_requests"].samples if s.labels["handler"] == COMPLETIONS)
    assert (good.labels["status"], good.labels["method"], good.value) == ("2xx", "POST", 1.0)
    durations = families["http_request_duration_seconds"]
    assert {s.labels["handler"] for s in durations.samples} == {COMPLETIONS}
    sources = {
        s.labels["source"]: s.value for s in families["vllm:prompt_tokens_by_source"].samples
    }
    assert sources == {"local_compute": 1.0, "local_cache_hit": 0.0}


def test_adapters_with_requests_come_as_labels_under_vllm_s_name() -> None:
    stats = {
        "lora_adapters_max": 8.0,
        'lora_requests_running{lora_name="sql"}': 2.0,
        'lora_requests_running{lora_name="chat"}': 1.0,
        'lora_requests_waiting{lora_name="sql"}': 0.0,
        'lora_requests_waiting{lora_name="chat"}': 3.0,
    }
    of = {"role": "attention", "state": "SERVING"}
    workers = [
        {**of, "name": "a", "rank": 0, "stats": stats},
        {**of, "name": "b", "rank": 1, "stats": {"lora_adapters_max": 8.0}},
    ]
    snapshot = {"state": "SERVING", "workers": workers}
    began = time.time()
    text = GatewayMetrics("tiny", lambda: snapshot, has_vllm_names=True).render().decode()
    families = {f.name: f for f in text_string_to_metric_families(text)}
    ours = families["expertmesh:lora_requests_running"].samples
    assert {s.labels["lora_name"]: s.value for s in ours} == {"sql": 2.0, "chat": 1.0}
    theirs = families["vllm:lora_requests_info"]
    assert theirs.type == "gauge"
    first, second = theirs.samples
    assert (first.labels["engine"], first.labels["model_name"]) == ("0", "tiny")
    assert first.labels["running_lora_adapters"] == "sql,chat"
    assert first.labels["waiting_lora_adapters"] == "chat"
    assert first.labels["max_lora"] == "8"
    assert "lora_name" not in first.labels
    assert began <= first.value <= time.time()
    assert (second.labels["engine"], second.labels["running_lora_adapters"]) == ("1", "")
    assert "vllm:lora_requests_running" not in families
