"""``kill -9`` of the attention worker of a session: it goes on from the copies at another one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness.cluster_gateway import Answer, gateway_of
from tests.harness.conversation import Conversation
from tests.harness.fault_rows import kill, quiet_config, row_config, whole
from tests.harness.serving_cluster import (
    RayCluster,
    ServingCluster,
    ThreadCluster,
    connected_ray,
    serving,
)

NUM_TURNS = 4


def undisturbed() -> list[Answer]:
    """The session where nothing happens."""
    cluster = ThreadCluster(quiet_config(1, 1))
    with serving(cluster), gateway_of(cluster) as gateway:
        talk = Conversation(gateway)
        return [talk.turn() for _ in range(NUM_TURNS)]


def num_restored(cluster: ServingCluster) -> float:
    """Tokens that came from host memory, on workers that live."""
    found = cluster.snapshot(fresh=True)["workers"]
    name = 'kv_restore_tokens_total{tier="host"}'
    return sum(float(w["stats"].get(name, 0.0)) for w in found if w["state"] == "SERVING")


def is_lost(snapshot: dict[str, Any], name: str) -> bool:
    return any(w["name"] == name and w["state"] == "LOST" for w in snapshot["workers"])


@pytest.mark.ray
def test_a_session_survives_its_worker_between_turns_and_within_one() -> None:
    expected = undisturbed()
    config = row_config(2, 1, kv_tiers={"kv_host_bytes": 64 << 20})
    with connected_ray(), serving(RayCluster(config)) as cluster, gateway_of(cluster) as gateway:
        talk = Conversation(gateway)
        streams = talk.begin()
        home, answers = talk.home(), [talk.end(streams)]
        talk.wait_copies()

        kill(cluster, home)  # between two turns
        cluster.wait(lambda s: is_lost(s, home))
        whole(cluster)
        talk.wait_workers(2)
        num_known = talk.num_computed
        answers.append(talk.turn())
        assert answers[1].cached_tokens == num_known
        talk.wait_copies()

        num_known = talk.num_computed
        streams = talk.begin()
        streams.wait_tokens(10)
        kill(cluster, talk.home())  # within a turn
        answers.append(talk.end(streams))
        assert gateway.num_resubmitted == 1
        whole(cluster)
        assert num_restored(cluster) >= num_known, "the worker in its place had computed nothing"

        num_known = talk.num_computed
        answers.append(talk.turn())
        assert answers[3].cached_tokens == num_known
    assert answers == expected
