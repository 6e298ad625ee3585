"""Answers of Ray about its nodes, which are data here."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from cluster.actors import ray_tools
from cluster.core.errors import ConfigError
from cluster.launch.joining import wait_nodes


def node(number: int, **labels: str) -> dict[str, Any]:
    return {
        "NodeID": f"n{number}",
        "NodeManagerAddress": f"10.0.0.{number}",
        "Alive": True,
        "Resources": {"CPU": 2.0},
        "Labels": {f"expertmesh/{name}": value for name, value in labels.items()},
    }


def test_a_node_with_an_invalid_label_is_left_out_and_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = [node(1, role="expert"), node(2, role="exprt"), {**node(3), "Alive": False}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    for _ in range(2):
        (found,) = ray_tools.cluster_nodes()
        assert found.node_id == "n1"
    (record,) = caplog.records
    assert "expertmesh/role of node 10.0.0.2" in record.getMessage()
    with pytest.raises(ConfigError, match=r"node 10\.0\.0\.2"):
        ray_tools.cluster_nodes(is_strict=True)
    with pytest.raises(ConfigError, match=r"node 10\.0\.0\.2"):
        wait_nodes(1, 0.0)  # a start names it at once
