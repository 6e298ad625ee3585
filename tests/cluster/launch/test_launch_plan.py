from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.config.cluster import ClusterConfig
from cluster.config.gateway import GatewaySection
from cluster.config.model import ModelSection
from cluster.config.workers import WorkersSection
from cluster.core.codec import from_plain
from cluster.core.errors import ConfigError
from cluster.core.process import count_cpus
from cluster.launch.checkpoint_check import CheckpointFacts
from cluster.launch.model_plan import ModelPlan
from cluster.launch.plan import (
    LaunchPlan,
    check_ports,
    claim_ports,
    count_gpus,
    free_port,
)
from cluster.sizing.start_plan import plan_start

BANKS = (
    {
        "bank": "mlp",
        "layer": 0,
        "num_experts": 4,
        "top_k": 2,
        "expert_values": 1000,
        "num_exchanges": 1,
        "in_values": 16,
        "out_values": 16,
    },
)


def plan(host: str = "127.0.0.1") -> LaunchPlan:
    gateway = GatewaySection(host=host, api_keys=("k",))
    model = ModelSection(path="/m", served_model_name="m")
    return LaunchPlan(
        command="serve",
        name="x",
        asked={"MODEL": "m"},
        config=ClusterConfig(model=model, gateway=gateway, cluster_token="t"),
        facts=CheckpointFacts(
            model_type="m",
            dtype="bfloat16",
            context_tokens=100,
            kv_vectors_per_token=4,
            head_dim=16,
            attention_values=5000,
            attention_weights=6000,
            banks=BANKS,
            torch_has_cuda=False,
        ),
        profile=None,
        address="",
        temp_dir="/tmp/em-x",
        num_cpus=2,
        num_gpus=0,
    )


def test_the_url_shows_tls() -> None:
    secure = plan().config.to_dict()
    secure["gateway"] |= {"tls_cert": "/c", "tls_key": "/k"}
    one = dataclasses.replace(plan(), config=ClusterConfig.from_dict(secure))
    assert (plan().http_url, one.http_url) == ("http://127.0.0.1:8000", "https://127.0.0.1:8000")


def test_a_plan_survives_the_pipe_to_the_launcher() -> None:
    assert from_plain(json.loads(json.dumps(dataclasses.asdict(plan()))), LaunchPlan) == plan()


def plan_of_two(
    second: WorkersSection | None = None, profile: dict[str, Any] | None = None
) -> LaunchPlan:
    """The plan, and a second model whose workers may differ."""
    first, workers = plan(), second or WorkersSection()
    config = replace(
        first.config,
        model=ModelSection(path="/n", served_model_name="n"),
        workers=replace(workers, other_pools=(("attention", 1), ("expert", 2))),
        fleet="model-1",
    )
    other = ModelPlan(config=config, facts=replace(first.facts, head_dim=32), profile=profile)
    pools = tuple(workers.pools.items())
    own = replace(first.config, workers=replace(first.config.workers, other_pools=pools))
    return replace(first, config=own, others=(other,))


def test_a_plan_of_two_models_survives_the_pipe_to_the_launcher() -> None:
    made = plan_of_two(profile={"schema": 1})
    back = from_plain(json.loads(json.dumps(dataclasses.asdict(made))), LaunchPlan)
    assert back == made
    assert [model.config.model.served_model_name for model in back.models] == ["m", "n"]
    assert [model.facts.head_dim for model in back.models] == [16, 32]
    assert [model.profile for model in back.models] == [None, {"schema": 1}]
    assert [model.config.namespace for model in back.models] == ["expertmesh", "expertmesh.model-1"]


def test_one_model_is_the_plan_itself() -> None:
    made = plan()
    assert made.models == (made,)


def test_the_workers_of_every_model_must_fit() -> None:
    made = plan_of_two()
    assert made.planned(made.private_nodes) == made
    large = plan_of_two(WorkersSection(cpus_per_worker=1.0))
    with pytest.raises(ConfigError, match=r"^cpus_per_worker \(1\) does not fit: 3 workers"):
        large.planned(large.private_nodes)
    many = plan_of_two(WorkersSection(num_expert_workers=5))
    with pytest.raises(ConfigError, match="must not exceed the 4 experts"):
        many.planned(many.private_nodes)


def test_the_mode_of_each_model_is_resolved() -> None:
    made = plan_of_two(WorkersSection(mode="auto", num_expert_workers=1))
    resolved = made.planned(made.private_nodes)
    assert resolved.config == made.config, "its mode is given"
    assert resolved.others[0].config.workers.mode != "auto"
    assert resolved.others[0].config.workers.mode_reason
    assert (resolved.name, resolved.others[0].facts) == (made.name, made.others[0].facts)


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "[::1]"),
        ("box.example", "box.example"),
    ],
)
def test_the_ready_line_names_an_address_that_can_be_reached(host: str, shown: str) -> None:
    assert plan(host).http_url == f"http://{shown}:8000"
    assert plan(host).grpc_target == f"{shown}:50051"


def test_a_free_port_passes_and_a_busy_one_is_named(busy_port: int) -> None:
    check_ports("127.0.0.1", {"port": free_port("127.0.0.1"), "grpc_port": 0})
    with pytest.raises(ConfigError, match="is in use on 127") as caught:
        check_ports("127.0.0.1", {"grpc_port": busy_port})
    assert (caught.value.field, caught.value.value) == ("grpc_port", busy_port)


def test_free_ports_are_not_those_of_outgoing_connections() -> None:
    range_file = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if not range_file.is_file() or int(range_file.read_text().split()[0]) <= 20_000:
        pytest.skip("the range for outgoing connections is elsewhere, or takes up nearly all")
    ports = {free_port("127.0.0.1") for _ in range(20)}
    assert len(ports) > 10
    assert all(20_000 <= port < int(range_file.read_text().split()[0]) for port in ports)


def test_a_port_that_is_shared_by_others_counts_as_busy() -> None:
    with contextlib.closing(socket.socket()) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        with pytest.raises(ConfigError, match="is in use"):
            check_ports("127.0.0.1", {"port": server.getsockname()[1]})


def test_a_port_is_claimed_by_one_cluster_at_a_time() -> None:
    port = free_port("127.0.0.1")
    claims = claim_ports("127.0.0.1", {"port": port, "grpc_port": 0})
    with pytest.raises(ConfigError, match="by a cluster that starts now") as caught:
        claim_ports("127.0.0.1", {"grpc_port": free_port("127.0.0.1"), "port": port})
    assert (caught.value.field, caught.value.value) == ("port", port)
    check_ports("127.0.0.1", {"port": port})  # the port itself stays free for its gateway
    for claim in claims:
        claim.close()
    for claim in claim_ports("127.0.0.1", {"port": port}):
        claim.close()


def test_a_port_of_a_host_with_a_long_name_can_be_claimed() -> None:
    host = ".".join(["h" * 60] * 4)
    claims = claim_ports(host, {"port": 8000})
    with pytest.raises(ConfigError, match="by a cluster that starts now"):
        claim_ports(host, {"port": 8000})
    for claim in claims:
        claim.close()


def test_a_port_with_old_connections_is_free() -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        server.accept()[0].close()  # we close first: this side waits in TIME_WAIT
        client.close()
    check_ports("127.0.0.1", {"port": port})


def test_an_address_of_another_host_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be opened on 203"):
        check_ports("203.0.113.1", {"port": 8000})


@pytest.mark.parametrize("host", ["127.0..1", "a" * 70])
def test_a_host_that_is_no_name_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="cannot be resolved"):
        check_ports(host, {"port": 8000})


def test_what_does_not_fit_on_this_host_is_refused() -> None:
    config, nodes = plan().config, plan().private_nodes
    plan_start(config, BANKS, nodes)
    with pytest.raises(ConfigError, match="num_expert_workers"):
        plan_start(config, ({**BANKS[0], "num_experts": 1},), nodes)


def test_auto_is_decided_once_and_says_why() -> None:
    asked = replace(plan(), config=replace(plan().config, workers=WorkersSection(mode="auto")))
    workers = asked.resolved(asked.private_nodes).config.workers
    assert workers.mode in ("colocated", "disaggregated")
    assert "a decode step of 64 rows with 50 tokens of context" in workers.mode_reason
    assert plan().resolved(asked.private_nodes) == plan()


def test_sharing_experts_is_decided_once_too() -> None:
    groups = WorkersSection(num_prefill_workers=1, num_decode_workers=1, share_experts="auto")
    asked = replace(plan(), config=replace(plan().config, workers=groups))
    workers = asked.resolved(asked.private_nodes).config.workers
    assert workers.share_experts in ("yes", "no")
    assert workers.mode_reason.startswith("step groups")


def test_there_is_a_cpu() -> None:
    assert count_cpus() >= 1


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,3", 2)])
def test_visible_devices_limit_the_gpus(
    visible: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus() == count
