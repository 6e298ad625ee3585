"""Sessions are copied between workers: they go on from the copies when their own worker is gone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from tests.harness.cluster_gateway import Answer, ClusterGateway, gateway_of
from tests.harness.conversation import Conversation
from tests.harness.fault_rows import quiet_config, whole
from tests.harness.serving_cluster import (
    RUNTIMES,
    WAIT_LIMIT_S,
    ThreadCluster,
    ThreadWorkerGroup,
    serving,
)
from workers.process.attention_runtime import AttentionRuntime
from workers.process.colocated_runtime import ColocatedRuntime
from workers.process.runtime import WorkerRuntime

TIERS = {"kv_host_bytes": 64 << 20}


class _Mortal(AttentionRuntime):
    """Dies between two steps when it is told to."""

    must_die = False

    def die(self) -> None:
        self.must_die = True
        self.connections.wake()

    def _between_steps(self) -> None:
        if self.must_die:
            raise RuntimeError("it dies here")
        super()._between_steps()


class _MortalColocated(_Mortal, ColocatedRuntime):
    pass


@contextmanager
def mortal(
    mode: str, tiers: Mapping[str, Any] = TIERS
) -> Iterator[tuple[ThreadCluster, ClusterGateway]]:
    """Two workers with attention, and a gateway."""
    num_experts = 2 if mode == "colocated" else 1
    config = quiet_config(2, num_experts, mode=mode, kv_tiers=dict(tiers))
    classes: Mapping[Any, type[WorkerRuntime]] = {
        **RUNTIMES,
        "attention": _Mortal,
        "colocated": _MortalColocated,
    }
    cluster = ThreadCluster(config, ThreadWorkerGroup(classes))
    with serving(cluster), gateway_of(cluster) as gateway:
        yield cluster, gateway


def kill(cluster: ThreadCluster, name: str) -> None:
    """A worker dies; another one takes its place."""
    runtime = cluster.group.runtimes[name]
    assert isinstance(runtime, _Mortal)
    runtime.die()
    cluster.wait(lambda s: any(w["name"] == name and w["state"] == "LOST" for w in s["workers"]))


def undisturbed(num_turns: int) -> list[Answer]:
    """The session where nothing happens."""
    cluster = ThreadCluster(quiet_config(1, 1))
    with serving(cluster), gateway_of(cluster) as gateway:
        talk = Conversation(gateway)
        return [talk.turn() for _ in range(num_turns)]


@pytest.fixture(scope="module")
def expected() -> list[Answer]:
    return undisturbed(3)


def stat(cluster: ThreadCluster, name: str) -> float:
    """A number of all workers that live."""
    found = cluster.snapshot(fresh=True)["workers"]
    return sum(float(w["stats"].get(name, 0.0)) for w in found if w["state"] == "SERVING")


@pytest.mark.parametrize("mode", ["disaggregated", "colocated"])
def test_a_session_goes_on_from_its_copies(mode: str, expected: list[Answer]) -> None:
    with mortal(mode) as (cluster, gateway):
        talk = Conversation(gateway)
        streams = talk.begin()
        home = talk.home()
        answers = [talk.end(streams)]
        holders = talk.wait_copies()
        assert home in holders
        kill(cluster, home)
        whole(cluster)
        talk.wait_workers(2)
        for _ in range(2):  # the second one shows that copies are made anew
            num_known = talk.num_computed
            streams = talk.begin()
            home = talk.home()
            answers.append(talk.end(streams))
            assert answers[-1].cached_tokens == num_known
            assert talk.wait_copies() - {home}
    assert answers == expected
    assert gateway.num_resubmitted == 0


def test_a_turn_that_loses_its_worker_is_restored(expected: list[Answer]) -> None:
    with mortal("disaggregated") as (cluster, gateway):
        talk = Conversation(gateway)
        answers = [talk.turn()]
        talk.wait_copies()
        num_known = talk.num_computed
        streams = talk.begin()
        streams.wait_tokens(10)
        kill(cluster, talk.home())
        answers.append(talk.end(streams))
        assert gateway.num_resubmitted == 1
        assert stat(cluster, 'kv_restore_tokens_total{tier="host"}') >= num_known
    assert answers == expected[:2]


def test_sessions_of_a_drained_worker_go_on_from_their_copies(expected: list[Answer]) -> None:
    with mortal("disaggregated") as (cluster, gateway):
        talk = Conversation(gateway)
        streams = talk.begin()
        home = talk.home()
        answers = [talk.end(streams)]
        talk.wait_copies()
        cluster.call("drain", {"worker": home, "limit_s": WAIT_LIMIT_S})
        cluster.wait(
            lambda s: any(w["name"] == home and w["state"] == "DRAINED" for w in s["workers"])
        )
        num_known = talk.num_computed
        answers.append(talk.turn())
        assert answers[1].cached_tokens == num_known
    assert answers == expected[:2]


@pytest.mark.parametrize(
    "tiers",
    [
        pytest.param({}, id="no host memory"),
        pytest.param({**TIERS, "session_copies": False}, id="switched off"),
    ],
)
def test_nothing_is_copied_without_host_memory_or_when_switched_off(
    tiers: Mapping[str, Any],
) -> None:
    with mortal("disaggregated", tiers) as (cluster, gateway):
        talk = Conversation(gateway)
        talk.turn()
        answer = talk.turn()
        assert answer.cached_tokens
        hellos = gateway.run(_hellos(gateway))
        assert hellos == [False, False]
        assert stat(cluster, "session_copy_blocks_total") == 0


async def _hellos(gateway: ClusterGateway) -> list[bool]:
    found = (client.hello for client in gateway.engines.clients)
    return [hello.keeps_copies for hello in found if hello is not None]
