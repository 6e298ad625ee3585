"""Rules of the configuration, and its way between processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cluster.config.cluster import ClusterConfig, EngineSection
from cluster.config.gateway import GatewaySection
from cluster.config.model import ModelSection
from cluster.config.transport import TransportSection
from cluster.config.workers import WorkersSection
from cluster.core.errors import ConfigError


def make_config(**sections: object) -> ClusterConfig:
    model = ModelSection(path="somewhere", served_model_name="m")
    return ClusterConfig.from_dict(ClusterConfig(model=model).to_dict() | sections)


def _groups(**other: Any) -> WorkersSection:
    return WorkersSection(**{"num_prefill_workers": 1, "num_decode_workers": 1, **other})


BROKEN: list[tuple[str, Callable[[], object]]] = [
    ("dtype", lambda: ModelSection(path="p", served_model_name="m", dtype="int8")),  # type: ignore[arg-type]
    ("served_model_name", lambda: ModelSection(path="p", served_model_name="")),
    ("max_model_len", lambda: ModelSection(path="p", served_model_name="m", max_model_len=0)),
    ("num_attention_workers", lambda: WorkersSection(num_attention_workers=0)),
    ("num_attention_workers", lambda: WorkersSection(mode="local", num_attention_workers=2)),
    ("follow_nodes", lambda: WorkersSection(mode="local", follow_nodes=True)),
    ("num_attention_workers", lambda: WorkersSection(mode="colocated", num_attention_workers=1)),
    ("num_decode_workers", lambda: WorkersSection(num_prefill_workers=1)),
    ("num_prefill_workers", lambda: WorkersSection(num_decode_workers=1)),
    ("num_prefill_workers", lambda: _groups(num_prefill_workers=0)),
    ("num_attention_workers", lambda: _groups(num_attention_workers=2)),
    ("mode", lambda: _groups(mode="colocated")),
    ("share_experts", lambda: _groups(share_experts="maybe")),
    ("share_experts", lambda: _groups(share_experts="no", num_expert_workers=1)),
    ("share_experts", lambda: _groups(share_experts="no", placement_file="p.json")),
    ("share_experts", lambda: WorkersSection(share_experts="no")),
    (
        "num_prefill_workers",
        lambda: make_config(
            workers={"num_prefill_workers": 1, "num_decode_workers": 1},
            transport={"transport": "collective"},
        ),
    ),
    (
        "num_prefill_workers",
        lambda: make_config(
            workers={"num_prefill_workers": 1, "num_decode_workers": 1},
            engine={"enable_prefix_caching": False},
        ),
    ),
    ("num_expert_workers", lambda: WorkersSection(num_expert_workers=-1)),
    ("num_redundant_experts", lambda: WorkersSection(num_redundant_experts=-1)),
    ("cpus_per_worker", lambda: WorkersSection(cpus_per_worker=0)),
    ("gpus_per_worker", lambda: WorkersSection(gpus_per_worker=-0.5)),
    ("gpus_per_worker", lambda: WorkersSection(gpus_per_worker=2)),
    ("max_num_seqs", lambda: EngineSection(max_num_seqs=0)),
    ("max_num_batched_tokens", lambda: EngineSection(max_num_seqs=9, max_num_batched_tokens=8)),
    ("max_num_batched_tokens", lambda: EngineSection(max_num_batched_tokens=0)),
    ("kv_cache_bytes", lambda: EngineSection(kv_cache_bytes=0)),
    ("gpu_memory_utilization", lambda: EngineSection(gpu_memory_utilization=0)),
    ("gpu_memory_utilization", lambda: EngineSection(gpu_memory_utilization=1.01)),
    ("kv_cache_dtype", lambda: EngineSection(kv_cache_dtype="fp8_e5m2")),  # type: ignore[arg-type]
    ("itl_target_ms", lambda: EngineSection(itl_target_ms=0)),
    ("itl_target_ms", lambda: EngineSection(itl_target_ms=float("nan"))),
    ("max_waiting_tokens", lambda: EngineSection(max_waiting_tokens=0)),
    ("num_micro_batches", lambda: EngineSection(num_micro_batches=3)),  # type: ignore[arg-type]
    ("micro_batch_decode_threshold", lambda: EngineSection(micro_batch_decode_threshold=1)),
    ("micro_batch_prefill_threshold", lambda: EngineSection(micro_batch_prefill_threshold=0)),
    ("detection_limit_s", lambda: TransportSection(detection_limit_s=0)),
    ("heartbeat_s", lambda: TransportSection(heartbeat_s=3)),
    ("port", lambda: GatewaySection(port=70000)),
    ("grpc_port", lambda: GatewaySection(port=9000, grpc_port=9000)),
    ("max_n", lambda: GatewaySection(max_n=129)),
    ("max_logprobs", lambda: GatewaySection(max_logprobs=-1)),
    ("num_gateway_replicas", lambda: GatewaySection(num_gateway_replicas=0)),
    ("routing_policy", lambda: GatewaySection(routing_policy="random")),  # type: ignore[arg-type]
    ("metrics_prefix", lambda: GatewaySection(metrics_prefix="9 x")),
    ("metrics_prefix", lambda: GatewaySection(metrics_prefix="vllm:", vllm_metric_names=True)),
    ("host", lambda: GatewaySection(host="0.0.0.0")),
]


@pytest.mark.parametrize(("field", "build"), BROKEN, ids=[f for f, _ in BROKEN])
def test_broken_rules_name_the_field(field: str, build: Callable[[], object]) -> None:
    with pytest.raises(ConfigError) as caught:
        build()
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("limit_s", "heartbeat_s", "alive_s"),
    [(2.0, 0.5, 0.1), (0.8, 0.2, 0.1), (0.2, 0.05, 0.05), (4.0, 0.5, 0.2), (60.0, 0.5, 0.5)],
)
def test_workers_show_life_as_often_as_the_detection_limit_demands(
    limit_s: float, heartbeat_s: float, alive_s: float
) -> None:
    section = TransportSection(detection_limit_s=limit_s, heartbeat_s=heartbeat_s)
    assert section.alive_s == pytest.approx(alive_s)


def test_more_attention_workers_than_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="more workers than can ever have work"):
        make_config(workers={"num_attention_workers": 5000})


def test_config_survives_json() -> None:
    gateway = GatewaySection(api_keys=("a", "b"))
    config = ClusterConfig(
        model=ModelSection(path="p", served_model_name="m"), gateway=gateway, cluster_token="t"
    )
    assert ClusterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("sections", [{"nonsense": 1}, {"engine": {"nonsense": 1}}])
def test_unknown_keys_are_refused(sections: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="nonsense"):
        make_config(**sections)


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"engine": 1}, r"engine \(1\) has the wrong type"),
        ({"engine": {"max_num_seqs": "x"}}, r"max_num_seqs \(x\) has the wrong type: .*`int`"),
        ({"lora": {"lora_roots": "/a"}}, r"lora_roots \(/a\) has the wrong type"),
        ({"model": {}}, r"model\.path \(None\) must be set"),
        ({"model": {"path": "p", "served_model_name": "m", "dtype": []}}, r"dtype .* must be one"),
        ({"cluster_token": 1}, r"cluster_token \(1\) has the wrong type"),
    ],
)
def test_values_of_a_wrong_type_are_refused(sections: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make_config(**sections)


@pytest.mark.parametrize(
    ("max_num_seqs", "on_cpu", "on_gpus"),
    [(64, 512, {1: 2048, 2: 2048, 3: 1365, 100: 512}), (3000, 3000, {1: 3000, 8: 3000})],
)
def test_the_tokens_of_a_step_depend_on_the_device(
    max_num_seqs: int, on_cpu: int, on_gpus: dict[int, int]
) -> None:
    section = EngineSection(max_num_seqs=max_num_seqs)
    assert section.step_tokens == on_cpu
    assert {number: section.on_gpus(number).step_tokens for number in on_gpus} == on_gpus
    assert replace(section, max_num_batched_tokens=4096).on_gpus(9).step_tokens == 4096


def test_the_cluster_token_is_not_shown() -> None:
    model = ModelSection(path="p", served_model_name="m")
    assert "secret" not in repr(ClusterConfig(model=model, cluster_token="secret"))


def test_public_host_needs_keys_or_consent() -> None:
    assert GatewaySection(host="0.0.0.0", api_keys=("k",)).host == "0.0.0.0"
    assert GatewaySection(host="0.0.0.0", allow_unauthenticated=True).host == "0.0.0.0"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "127.255.0.9", "::1", "localhost"])
def test_any_loopback_address_needs_no_key(host: str) -> None:
    assert GatewaySection(host=host, admin_host=host).host == host


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "128.0.0.1", "127.0.0.1.example", "local"])
def test_any_other_address_is_public(host: str) -> None:
    with pytest.raises(ConfigError, match=r"^host .* is public"):
        GatewaySection(host=host)
    with pytest.raises(ConfigError, match=r"admin_host .* is public"):
        GatewaySection(admin_host=host)


def test_a_host_is_not_empty() -> None:
    """gRPC binds no port without a host, which would end the start after the weights are loaded."""
    with pytest.raises(ConfigError, match=r"^host \(\) must not be empty"):
        GatewaySection(host="", api_keys=("k",))
    with pytest.raises(ConfigError, match=r"^admin_host \(\) must not be empty"):
        GatewaySection(admin_host="", admin_keys=("k",))


def test_fingerprint_changes_with_what_workers_must_share() -> None:
    base = make_config()
    assert base.fingerprint() == make_config(gateway={"port": 9999}).fingerprint()
    assert base.fingerprint() != make_config(engine={"combine_mode": "per_slot"}).fingerprint()
    off = make_config(engine={"enable_prefix_caching": False})
    assert base.fingerprint() != off.fingerprint()
    assert base.fingerprint() != make_config(engine={"kv_cache_dtype": "fp8"}).fingerprint()


def test_deterministic_implies_what_it_needs() -> None:
    config = make_config(engine={"deterministic": "on"})
    assert config.workers.device == "cpu", "auto never takes a GPU then"
    assert config.fingerprint() != make_config().fingerprint()
    assert ClusterConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match=r"device \(cuda\) must be cpu with deterministic"):
        make_config(engine={"deterministic": "on"}, workers={"device": "cuda"})


def test_local_mode_has_no_expert_ranks() -> None:
    section = WorkersSection(mode="local")
    assert (section.pools, section.num_workers) == ({"attention": 1}, 1)


def test_colocated_workers_are_both() -> None:
    section = WorkersSection(mode="colocated", num_expert_workers=3)
    assert (section.pools, section.num_workers) == ({"colocated": 3}, 3)
    assert section.num_attention_ranks == 3
    assert replace(section, num_attention_workers=3).num_attention_ranks == 3
