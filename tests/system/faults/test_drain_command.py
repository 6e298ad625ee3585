"""``expertmesh drain`` from the command line to the worker's end, with clients on the cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest

from benchmarks.harness.cluster_gateway import ClusterGateway, gateway_of
from benchmarks.harness.mixed_calls import make_calls
from benchmarks.harness.serving_cluster import ThreadCluster, serving
from cluster.cli.main import main
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.config.gateway import GatewaySection
from gateway.admin.service import AdminApi
from gateway.protocols import build_public_app
from protos import admin_pb2 as pb
from protos.admin_pb2_grpc import AdminStub
from tests.gateway.stack import start_http
from tests.harness.fault_rows import SMALL, check_answers, quiet_config, undisturbed


@contextmanager
def ports_of(gateway: ClusterGateway) -> Iterator[tuple[str, AdminApi]]:
    """The public HTTP port, and the admin ports that its status names."""
    admin = AdminApi(gateway.core, GatewaySection(admin_port=0, admin_grpc_port=0))
    gateway.run(admin.start())
    gateway.core.status.addresses = {"admin_http": admin.http, "admin_grpc": admin.grpc}
    url, stop = gateway.run(start_http(build_public_app(gateway.core)))
    try:
        yield url, admin
    finally:
        gateway.run(stop())
        gateway.run(admin.stop())


def test_streams_go_on_while_a_worker_is_drained_by_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = undisturbed(SMALL)
    with (
        serving(ThreadCluster(quiet_config(2, 1))) as cluster,
        gateway_of(cluster) as gateway,
        ports_of(gateway) as (url, admin),
    ):
        streams = gateway.stream(make_calls(SMALL.num_streams, SMALL.num_tokens))
        streams.wait_tokens(SMALL.num_streams)
        assert main(["--url", url, "drain", "worker", "attention-1", "--json"]) == ExitCode.OK
        operation = json.loads(capsys.readouterr().out)
        check_answers(streams.finish(), expected)
        assert (operation["state"], operation["target"]) == ("SUCCEEDED", "attention-1")
        assert operation["drain"]["workers"] == ["attention-1"]
        with grpc.insecure_channel(admin.grpc) as channel:
            stub = AdminStub(channel)
            same = stub.GetOperation(pb.GetOperationRequest(id=operation["id"]))
            workers = stub.ListWorkers(pb.ListWorkersRequest()).workers
        assert same.state == pb.Operation.SUCCEEDED
        assert {w.name: w.state for w in workers}["attention-1"] == "DRAINED"
        assert main(["--url", url, "operations", "get", operation["id"]]) == ExitCode.OK
        assert main(["--url", url, "events"]) == ExitCode.OK
        assert "drained attention-1" in capsys.readouterr().out
        assert main(["--url", url, "drain", "worker", "attention-1"]) == ExitCode.REFUSED
        assert main(["--url", url, "drain", "worker", "expert-0"]) == ExitCode.REFUSED
        words = capsys.readouterr().err
        assert "attention-1 is DRAINED" in words
        assert "the other workers have no free slots" in words
