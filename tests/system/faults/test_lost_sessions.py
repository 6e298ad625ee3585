"""``kill -9`` of the attention worker of a session: it goes on from the copies at another one."""

from __future__ import annotations

import pytest

from benchmarks.faults.layouts import row_config
from benchmarks.harness.cluster_gateway import gateway_of
from benchmarks.harness.serving_cluster import RayCluster, connected_ray, serving
from tests.harness.conversation import (
    LONG,
    RESTORED,
    Conversation,
    total,
    undisturbed,
    wait_lost,
)
from tests.harness.fault_rows import kill, whole


@pytest.mark.slow
@pytest.mark.ray
def test_a_session_survives_its_worker_between_turns_and_within_one() -> None:
    expected = undisturbed(40, 40, LONG, 40)
    config = row_config(2, 1, kv_tiers={"kv_host_bytes": 64 << 20})
    with connected_ray(), serving(RayCluster(config)) as cluster, gateway_of(cluster) as gateway:
        talk = Conversation(gateway)
        streams = talk.begin()
        home, answers = talk.home(), [talk.end(streams)]
        talk.wait_copies()

        kill(cluster, home)  # between two turns
        wait_lost(cluster, home)
        whole(cluster)
        talk.wait_workers(2)
        num_known = talk.num_computed
        answers.append(talk.turn())
        assert answers[1].cached_tokens == num_known
        talk.wait_copies()

        num_known = talk.num_computed
        streams = talk.begin(LONG)
        streams.wait_tokens(10)
        kill(cluster, talk.home())  # within a turn
        answers.append(talk.end(streams))
        assert gateway.num_resubmitted == 1
        whole(cluster)
        assert total(cluster, RESTORED) >= num_known, "the worker in its place had computed nothing"

        num_known = talk.num_computed
        answers.append(talk.turn())
        assert answers[3].cached_tokens == num_known
    assert answers == expected
