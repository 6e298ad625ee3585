"""A network path between two workers loses everything in one direction; both workers live."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from tests.workers.transport.blackhole import lose_all_to
from workers.requests.request import Request, SamplingParams

NUM_TOKENS = 60
REQUEST = Request(
    request_id="r",
    prompt=(5, 6, 7),
    params=SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True),
)


@pytest.mark.parametrize(
    ("num_attention", "sender", "receiver"),
    [
        (1, "attention-0", "expert-1"),
        pytest.param(1, "expert-1", "attention-0", marks=pytest.mark.slow),
        pytest.param(2, "attention-0", "attention-1", marks=pytest.mark.slow),
        (2, "attention-1", "attention-0"),
    ],
)
def test_streams_go_on_without_the_path(
    tiny_checkpoint: Path, num_attention: int, sender: str, receiver: str
) -> None:
    """The end that is lost is the other one, not the worker of the stream."""
    config = make_config(tiny_checkpoint, num_attention, 3, transport={"detection_limit_s": 2.0})
    cluster = ThreadCluster(config)
    with serving(cluster):
        stream = cluster.stream()
        expected = stream.finish([REQUEST])["r"].tokens
        edges = cluster.group.workers[receiver].membership._connections.edges
        lose_all_to(edges[sender].sock)
        assert stream.finish([REQUEST])["r"].tokens == expected
        causes = [entry["cause"] for entry in cluster.snapshot()["history"]]
        assert any("no acknowledgement for" in cause for cause in causes), causes
        stream.close()
