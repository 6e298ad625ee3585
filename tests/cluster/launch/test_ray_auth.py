"""Whether a Ray asks for a token is found out by asking it without one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from cluster.config.cluster import ClusterConfig
from cluster.config.resources import NodeResources
from cluster.core.errors import ConfigError
from cluster.launch import joining
from tests.cluster.launch.test_launch_plan import plan


class Gcs(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
    """As much of Ray's GCS as is asked, with or without token authentication."""

    asks_for_token = False

    def GetAllNodeInfo(self, request: Any, context: Any) -> Any:
        if self.asks_for_token:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "Authentication token is missing")
        messages: Any = gcs_service_pb2
        return messages.GetAllNodeInfoReply()


@pytest.fixture
def gcs() -> Iterator[tuple[str, Gcs]]:
    servicer = Gcs()
    server = grpc.server(ThreadPoolExecutor(1))
    add: Any = gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server
    add(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", servicer
    server.stop(0).wait()


def test_a_ray_is_asked_without_a_token(gcs: tuple[str, Gcs]) -> None:
    address, servicer = gcs
    assert joining.allows_unauthenticated(address)
    servicer.asks_for_token = True
    assert not joining.allows_unauthenticated(address)


@pytest.mark.parametrize("num_hosts", [1, 2])
@pytest.mark.parametrize("is_allowed", [False, True], ids=["", "allowed"])
@pytest.mark.parametrize("asks", [False, True], ids=["no token", "token"])
def test_several_hosts_need_a_token_or_a_word(
    gcs: tuple[str, Gcs],
    num_hosts: int,
    is_allowed: bool,
    asks: bool,
) -> None:
    address, gcs[1].asks_for_token = gcs[0], asks
    nodes = tuple(
        NodeResources(node_id=str(n), address=f"10.0.0.{n}", cpus=8.0, gpus=0.0)
        for n in range(num_hosts)
    )
    data = plan().config.to_dict()
    data["gateway"]["allow_unauthenticated"] = is_allowed
    one = dataclasses.replace(plan(), config=ClusterConfig.from_dict(data))
    if num_hosts > 1 and not asks and not is_allowed:
        with pytest.raises(ConfigError, match="RAY_AUTH_MODE=token"):
            joining.check_ray_token(one, nodes, address)
        return
    joining.check_ray_token(one, nodes, address)
