"""What an endpoint picker of the Gateway API inference extension reads at ``/metrics``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from cluster.config.gateway import GatewaySection
from gateway.observability.metrics import GatewayMetrics
from tests.gateway.stack import WAIT_S, complete, running_stack
from tests.paths import ROOT

DEFAULT = {
    "queuedRequestsSpec": "vllm:num_requests_waiting",
    "runningRequestsSpec": "vllm:num_requests_running",
    "kvUsageSpec": "vllm:kv_cache_usage_perc",
    "loraSpec": "vllm:lora_requests_info",
    "cacheInfoSpec": "vllm:cache_config_info",
}
"""The configuration of a picker that is told nothing: ``defaultEngineConfigs`` in ``factories.go``
of llm-d/llm-d-router (ebab687927)."""
_PAGE = (ROOT / "docs" / "reference" / "metric-names.md").read_text(encoding="utf-8")
CONFIG = {"block_size": "16", "cache_dtype": "auto", "enable_prefix_caching": "True"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a picker knows of a server then."""

    queued: int
    running: int
    kv_usage: float
    block_size: int
    num_blocks: int
    max_adapters: int = 0
    running_adapters: frozenset[str] = frozenset()
    waiting_adapters: frozenset[str] = frozenset()


def read(text: str, config: Mapping[str, str] = DEFAULT) -> Seen:
    """As ``extractor.go`` reads: of several series the first, names of adapters by commas."""
    families = {family.name: family for family in text_string_to_metric_families(text)}
    cache = _first(families[config["cacheInfoSpec"]])
    lora = families.get(config.get("loraSpec", ""))
    adapters = _first(lora) if lora is not None else {}
    return Seen(
        queued=int(_value(families[config["queuedRequestsSpec"]])),
        running=int(_value(families[config["runningRequestsSpec"]])),
        kv_usage=_value(families[config["kvUsageSpec"]]),
        block_size=int(cache[config.get("cacheBlockSizeLabelName", "block_size")]),
        num_blocks=int(cache[config.get("cacheNumBlocksLabelName", "num_gpu_blocks")]),
        max_adapters=int(adapters.get("max_lora", "0")),
        running_adapters=_names(adapters.get("running_lora_adapters", "")),
        waiting_adapters=_names(adapters.get("waiting_lora_adapters", "")),
    )


def _value(family: Metric) -> float:
    assert family.type == "gauge"
    return float(family.samples[0].value)


def _first(family: Metric) -> dict[str, str]:
    assert family.type == "gauge"
    return dict(family.samples[0].labels)


def _names(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in text.split(",") if name.strip())


def _worker(rank: int, queued: float, running: float, free: int) -> dict[str, Any]:
    stats = {
        "num_requests_waiting": queued,
        "num_requests_running": running,
        "kv_cache_usage_perc": 1 - free / 100,
        "lora_adapters_max": 4.0,
        'lora_requests_running{lora_name="sql"}': 1.0,
        'lora_requests_waiting{lora_name="chat"}': 2.0,
    }
    return {
        "name": f"attention-{rank}",
        "role": "attention",
        "rank": rank,
        "state": "SERVING",
        "kv_blocks_free": free,
        "kv_blocks_total": 100,
        "stats": stats,
    }


def _scrape(*workers: dict[str, Any], has_vllm_names: bool = True) -> str:
    snapshot = {"state": "SERVING", "workers": [*workers]}
    metrics = GatewayMetrics("tiny", lambda: snapshot, CONFIG, has_vllm_names=has_vllm_names)
    return metrics.render().decode()


def test_the_default_configuration_reads_one_attention_worker() -> None:
    seen = read(_scrape(_worker(0, 3.0, 7.0, 25)))
    assert seen == Seen(
        queued=3,
        running=7,
        kv_usage=0.75,
        block_size=16,
        num_blocks=100,
        max_adapters=4,
        running_adapters=frozenset({"sql"}),
        waiting_adapters=frozenset({"chat"}),
    )


def test_the_configuration_of_the_page_reads_several_together() -> None:
    (block,) = re.findall(r"^```yaml\n(engineConfigs:.*?)^```", _PAGE, re.M | re.S)
    (config,) = yaml.safe_load(block)["engineConfigs"]
    workers = _worker(0, 3.0, 7.0, 25), _worker(1, 0.0, 1.0, 75)
    gone = {**_worker(2, 9.0, 9.0, 0), "state": "LOST"}
    seen = read(_scrape(*workers, gone, has_vllm_names=False), config)
    assert seen == Seen(queued=3, running=8, kv_usage=0.5, block_size=16, num_blocks=100)


def test_totals_are_left_out_while_no_worker_has_said_anything() -> None:
    silent = {"name": "attention-0", "role": "attention", "rank": 0, "state": "STARTING"}
    assert "cluster_requests" not in _scrape(silent)
    assert "cluster_kv_cache_usage_perc" not in _scrape(silent)


def test_a_picker_that_sends_no_key_reads_a_gateway_with_public_metrics() -> None:
    section = GatewaySection(
        vllm_metric_names=True,
        public_metrics=True,
        api_keys=("secret",),
        request_timeout_s=WAIT_S,
    )
    with running_stack(section) as stack, httpx.Client(base_url=stack.url) as picker:
        stack.http.headers["authorization"] = "Bearer secret"
        complete(stack, prompt="hello", max_tokens=3)
        assert picker.get("/v1/models").status_code == 401
        stats = stack.controller.state["workers"][0]["stats"] | {"num_requests_waiting": 4.0}
        workers = [{**stack.controller.state["workers"][0], "stats": stats}]
        stack.call(lambda: stack.controller.change(workers=workers))
        answer = picker.get("/metrics")
        assert answer.status_code == 200
        seen = read(answer.text)
        assert (seen.queued, seen.running, seen.kv_usage) == (4, 1, 0.0)
        assert (seen.block_size, seen.num_blocks) == (16, 10)
