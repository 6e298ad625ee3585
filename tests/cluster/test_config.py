"""Rules of the configuration, and its way between processes."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from cluster.config import (
    ClusterConfig,
    EngineSection,
    GatewaySection,
    ModelSection,
    TransportSection,
    WorkersSection,
)
from cluster.errors import ConfigError


def make_config(**sections: object) -> ClusterConfig:
    model = ModelSection(path="somewhere", served_model_name="m")
    return ClusterConfig.from_dict(ClusterConfig(model=model).to_dict() | sections)


BROKEN: list[tuple[str, Callable[[], object]]] = [
    ("dtype", lambda: ModelSection(path="p", served_model_name="m", dtype="int8")),  # type: ignore[arg-type]
    ("served_model_name", lambda: ModelSection(path="p", served_model_name="")),
    ("max_model_len", lambda: ModelSection(path="p", served_model_name="m", max_model_len=0)),
    ("num_attention_workers", lambda: WorkersSection(num_attention_workers=0)),
    ("num_attention_workers", lambda: WorkersSection(mode="local", num_attention_workers=2)),
    ("num_expert_workers", lambda: WorkersSection(num_expert_workers=-1)),
    ("num_redundant_experts", lambda: WorkersSection(num_redundant_experts=-1)),
    ("cpus_per_worker", lambda: WorkersSection(cpus_per_worker=0)),
    ("gpus_per_worker", lambda: WorkersSection(gpus_per_worker=-0.5)),
    ("max_num_seqs", lambda: EngineSection(max_num_seqs=0)),
    ("max_num_batched_tokens", lambda: EngineSection(max_num_seqs=9, max_num_batched_tokens=8)),
    ("kv_cache_bytes", lambda: EngineSection(kv_cache_bytes=0)),
    ("detection_limit_s", lambda: TransportSection(detection_limit_s=0)),
    ("heartbeat_s", lambda: TransportSection(heartbeat_s=3)),
    ("port", lambda: GatewaySection(port=70000)),
    ("grpc_port", lambda: GatewaySection(port=9000, grpc_port=9000)),
    ("max_n", lambda: GatewaySection(max_n=129)),
    ("num_gateway_replicas", lambda: GatewaySection(num_gateway_replicas=0)),
    ("host", lambda: GatewaySection(host="0.0.0.0")),
]


@pytest.mark.parametrize(("field", "build"), BROKEN, ids=[f for f, _ in BROKEN])
def test_broken_rules_name_the_field(field: str, build: Callable[[], object]) -> None:
    with pytest.raises(ConfigError) as caught:
        build()
    assert caught.value.field == field


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


def test_the_cluster_token_is_not_shown() -> None:
    model = ModelSection(path="p", served_model_name="m")
    assert "secret" not in repr(ClusterConfig(model=model, cluster_token="secret"))


def test_public_host_needs_keys_or_consent() -> None:
    assert GatewaySection(host="0.0.0.0", api_keys=("k",)).host == "0.0.0.0"
    assert GatewaySection(host="0.0.0.0", allow_unauthenticated=True).host == "0.0.0.0"


def test_fingerprint_changes_with_what_workers_must_share() -> None:
    base = make_config()
    assert base.fingerprint() == make_config(gateway={"port": 9999}).fingerprint()
    assert base.fingerprint() != make_config(engine={"combine_mode": "per_slot"}).fingerprint()


def test_local_mode_has_no_expert_ranks() -> None:
    section = WorkersSection(mode="local")
    assert (section.num_expert_ranks, section.num_workers) == (0, 1)
